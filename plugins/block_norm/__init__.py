"""The norms between the linears of a DiT block, with the residual before and the modulation behind: reference, kernel."""
