"""The Hugging Face hub: what a repository holds, its files here, a bundle there.

The client, huggingface_hub, is imported when the hub is first asked. It reads HF_ENDPOINT, HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE and the proxies' variables itself.
"""
