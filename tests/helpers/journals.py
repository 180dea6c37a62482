"""Sessions on disk, without a server."""

from __future__ import annotations

from typing import Any

from longtake.runtime.serve.describe import description
from longtake.runtime.serve.fragments import codec_for
from longtake.runtime.serve.journal import Journal, Meta
from longtake.runtime.serve.store import Store, new_id

SCRIPT = (("a red one", 2, False), ("a blue two", 3, True))


def begin(store: Store, generator: Any, **more: Any) -> Journal:
    about, codec = description(generator), codec_for("h264", 128, 128, 24, "libx264")
    given: dict[str, Any] = {
        "id": new_id("live"), "kind": "live", "user": "local", "created": 1.0, "model": about["model"], "script": SCRIPT,
        "seed": 3, "steps": 3, "guidance": 1.0, "negative_prompt": "", "shift": about["shift"], "solver": about["solver"],
        "width": 128, "height": 128, "fps": 24, "codec": codec.name, "encoder": codec.encoder, "about": {"mime": "x"},
    }  # fmt: skip
    journal = store.create(Meta(**{**given, **more}))
    journal.take(1, "w")
    return journal
