"""The live door: sessions over HTTP and WebSocket, kept in a journal."""
