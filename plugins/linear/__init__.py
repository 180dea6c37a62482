"""The linear ops: reference, and the library that runs them."""
