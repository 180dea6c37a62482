"""The camera branch's way into and out of ray coordinates."""
