"""An HTTP server in the shape of OpenAI's API, for the programs that speak it, and a page.

One room each: `limits` and `problems` (what is refused, and how it is said), `access` (who may
ask), `bodies`, `pictures`, `messages` and `parameters` (a body -> a checked request), `requests`
(those that run), `pool` (models, loaded when they are asked), `completion` (an answer's shape),
`chat`, `embeddings` and `photos` (the endpoints), `metrics`, `page`, `app` (the routes) and
`listening` (the socket and the end).

It needs the packages of the extra `server`; importing `edgevlm.server.app` is what asks for them.
"""
