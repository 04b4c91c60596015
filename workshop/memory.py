"""`python -m workshop.memory BUNDLE...`: what answers really hold beside what was estimated.

Every bundle answers about a drawn scene in processes of its own: with no limit, with one that has
room for one engine at a time, and with one that is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgevlm.byte_sizes import in_gb
from edgevlm.errors import EdgeVLMError

_PICTURE = Path(__file__).parent.parent / "examples" / "shapes.png"
_LINE = "{:<36} {:>9} {:>6} {:>8} {:>10} {:>10} {:>6}"


def answer(folder: str, limit: str) -> None:
    """Two answers about two pictures in this process; prints what they held, as JSON."""
    import numpy as np

    import edgevlm
    from edgevlm.bundle import open_bundle
    from edgevlm.runtimes.budget import needs
    from edgevlm.runtimes.memory import peak_bytes

    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    with edgevlm.load(Path(folder), max_memory=int(limit) or None, cache=False) as vlm:
        tokens = [vlm.ask("What is this?", p, max_tokens=4).token_ids for p in (_PICTURE, noise)]
        bundle, settings = open_bundle(Path(folder)), vlm.settings
        needed = needs(bundle, vlm.devices.vision.precision, settings.kv)
    estimate = needed.peak(settings.context, settings.repacking, apart=settings.apart)
    found = {"peak": peak_bytes(), "estimate": estimate, "apart": settings.apart}
    print(json.dumps(found | {"repacking": settings.repacking, "tokens": tokens}))


def held(folder: str, limit: int) -> dict[str, object]:
    """The findings of `answer` in a process of its own, with a limit in bytes or none, 0.

    Raises EdgeVLMError where the model is refused or fails.
    """
    command = [sys.executable, "-m", "workshop.memory", "--answer", folder, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EdgeVLMError(done.stderr.strip().splitlines()[-1])
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def _limits(folder: str) -> tuple[int, ...]:
    from edgevlm.bundle import open_bundle
    from edgevlm.runtimes.budget import needs

    bundle = open_bundle(folder)
    found = needs(bundle, bundle.vision_precisions[0], "f16")
    both, one = (found.peak(found.usual, "off", apart=apart) for apart in (False, True))
    return (0, both, one) if one < both else (0, both)


def main() -> None:
    """Prints a line for each bundle and limit."""
    if sys.argv[1:2] == ["--answer"]:
        try:
            return answer(*sys.argv[2:])
        except EdgeVLMError as e:
            sys.exit(str(e))
    print(_LINE.format("bundle", "limit", "apart", "repack", "estimate", "peak", "ratio"))
    for folder in sys.argv[1:]:
        for limit in _limits(folder):
            found = held(folder, limit)
            peak, estimate = int(str(found["peak"])), int(str(found["estimate"]))
            cells = (Path(folder).name, in_gb(limit) if limit else "none", str(found["apart"]))
            sizes = (in_gb(estimate), in_gb(peak), f"{estimate / peak:.2f}")
            print(_LINE.format(*cells, str(found["repacking"]), *sizes), flush=True)


if __name__ == "__main__":
    main()
