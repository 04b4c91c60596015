"""edgevlm beside other projects on the same weights, picture, prompt and machine.

A peer is a module of this package that has

    TITLE       what tables call it
    PACKAGE     the distribution whose version it states
    INSTALL     the line that installs it
    NEEDS       (may be left out) keys of the task without which it cannot run
    answer      (task) -> what it measured

and is found by that. `answer` loads the model, asks once to warm up and once to measure. It runs
in a process of its own, maybe of another Python, so that a peer imports its engine inside functions
and nothing of edgevlm (but `ours`, and `tinygptv_torch`, a model that no other project runs). What
it raises says why it cannot run the model: ImportError for what is not installed,
NotImplementedError for a model that the project does not have, any other error for what failed.

The task is a dict: `name`, `family`, `bundle` (folder), `decoder` (GGUF), `mmproj` (llama.cpp's
projector file), `config` and `pictures` (config.json and preprocessor_config.json as dicts),
`checkpoint` (folder), each of them None where there is none, `work` (a folder that stays from turn
to turn), `image`, `words` (the user's), `prompt` (the whole, with PICTURE and BEGIN), `before` and
`after` (token ids around the picture's `image_tokens`), `threads` and `n_tokens` (after the first).
The answer is a dict with those of METRICS that it can tell (milliseconds), `positions` (of the
prompt) and `how` (its precisions).
"""

# What stands for the picture (llama.cpp's own marker) and for the begin token in a whole prompt.
PICTURE = "<__media__>"
BEGIN = "<__begin__>"
# What a peer may measure: a key of its answer, what tables call it.
METRICS = {
    "encode_ms": "encode",
    "prefill_ms": "prefill",
    "first_token_ms": "first token",
    "token_ms": "one more token",
}
