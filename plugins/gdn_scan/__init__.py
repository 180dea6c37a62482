"""The recurrence of gated delta networks."""
