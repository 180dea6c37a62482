"""Where a pass's time goes: by layer of an engine, by kernel on a GPU."""
