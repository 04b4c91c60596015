"""A bundle put on the hub, with a card that says what it is."""

from __future__ import annotations

from edgevlm.bundle import Bundle
from edgevlm.hub.refusals import told
from edgevlm.manifest import MANIFEST
from edgevlm.specs import DecoderSpec

CARD = "README.md"


def upload(bundle: Bundle, repo: str, *, private: bool = False) -> str:
    """Uploads a bundle's files into a repository, which is made where there is none; returns the
    address of the commit. A card that is there stays. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    names = [MANIFEST, *(r.file for c in bundle.manifest.all_components for r in c.files)]
    with told(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        there = {found.rfilename for found in api.model_info(repo).siblings or ()}
        added = [CommitOperationAdd(name, str(bundle.folder / name)) for name in names]
        if CARD not in there:
            added.append(CommitOperationAdd(CARD, card(bundle, repo).encode()))
        done = api.create_commit(
            repo, added, commit_message=f"{bundle.manifest.name} as an edgevlm bundle"
        )
    return str(done.commit_url)


def _languages(decoder: DecoderSpec) -> list[str]:
    if not decoder.n_output:
        return []
    rows = f"{decoder.n_output} of {decoder.n_vocab} tokens"
    return [f"Answers can have {rows}, those of {', '.join(decoder.languages)}.", ""]


def card(bundle: Bundle, repo: str) -> str:
    """The model card of a bundle, in Markdown: sizes, parity, licence, how to use it."""
    manifest = bundle.manifest
    base, _, commit = manifest.origin.partition("@")
    kind, does = "image-text-to-text", "answers questions about pictures"
    command = 'ask "What is in this photo?" -i photo.jpg'
    if manifest.text:
        kind, does = "zero-shot-image-classification", "finds pictures by words and labels them"
        command = 'search "a dog in the snow" Photos'
    lines = [
        "---",
        f"license: {manifest.license or 'other'}",
        *([f"base_model: {base}", "base_model_relation: quantized"] if base else []),
        "library_name: edgevlm",
        f"pipeline_tag: {kind}",
        "---",
        "",
        f"# {manifest.name}",
        "",
        f"{base or manifest.name} as an edgevlm bundle, which {does} on the device in front of "
        "you.",
        "",
        f"    edgevlm pull {repo}",
        f"    edgevlm {command} -m {repo.rpartition('/')[2]}",
        "",
        *([f"Exported from commit {commit}.", ""] if commit else []),
        *_languages(manifest.decoder),
        "| component | precision | size |",
        "|---|---|---|",
    ]
    for role, component in (*manifest.components.items(), *manifest.alternatives.items()):
        size = sum(record.bytes for record in component.files)
        lines.append(f"| {role} | {component.precision} | {size / 2**20:.1f} MiB |")
    if not manifest.parity:
        return "\n".join([*lines, "", "It was not compared with the original.", ""])
    lines += ["", "Compared with the original, in float32:", ""]
    lines += ["| stage | metric | worst | tolerance |", "|---|---|---|---|"]
    for stage in manifest.parity:
        lines.append(
            f"| {stage.stage} | {stage.metric} | {stage.worst:.3g} | {stage.tolerance:.3g} |"
        )
    return "\n".join([*lines, ""])
