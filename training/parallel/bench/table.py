"""The report of `longtake bench parallel` for reading, and its ratios."""

from __future__ import annotations

from typing import Any


def ratios(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Balanced SP against the other modes at the same length: times and memory, theirs divided by ours."""
    found = []
    for ours in cases:
        for theirs in cases:
            same = theirs["chunks"] == ours["chunks"] and theirs["mode"] != "balanced" == ours["mode"]
            if same and "failed" not in ours and "failed" not in theirs:
                names = ("s_per_iteration", "s_per_sample", "peak_gb")
                numbers = {name: round(theirs[name] / ours[name], 3) for name in names}
                found.append({"seconds": ours["seconds"], "against": theirs["mode"], **numbers})
    return found


def table(result: dict[str, Any]) -> str:
    """The report for reading, in Markdown."""
    lines = [
        f"{result['gpu'] or result['cpu']} x {result['ranks']}, {result['preset']} with {result['layers']} layers, "
        f"{result['resolution']}, {result['precision']}",
        "",
        "| mode | clip s | iterations | s / iteration | s / sample | VAE s by rank | loss tokens by rank | peak GB by rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        if "failed" in case:
            lines.append(f"| {case['mode']} | {case['seconds']} | {case['failed']} | | | | | |")
            continue
        vae, tokens, peak = (
            ", ".join(f"{one[name]:{form}}" for one in case["ranks"])
            for name, form in (("vae_s", ".2f"), ("loss_tokens", "d"), ("peak_gb", ".1f"))
        )
        lines.append(
            f"| {case['mode']} | {case['seconds']} | {case['iterations']} | {case['s_per_iteration']:.2f} | {case['s_per_sample']:.2f} "
            f"| {vae} | {tokens} | {peak} |"
        )
    for one in result["ratio"]:
        lines.append(
            f"\nat {one['seconds']} s, {one['against']} / balanced: {one['s_per_iteration']} per iteration, "
            f"{one['s_per_sample']} per sample, {one['peak_gb']} memory"
        )
    for mode, one in result["longest"].items():
        words = [f"{one['fits_s']} s ran"]
        words += [f"{one['fails_s']} s did not ({one['why']})"] if one["fails_s"] else []
        words += [f"{one['estimated_s']} s by the peaks at two lengths"] if one["estimated_s"] else []
        lines.append(f"\nlongest clip, {mode}: {', '.join(words)}")
    return "\n".join(lines)
