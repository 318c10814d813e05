"""From a part's figures to rows of the table: arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmark.table import Row

STREAMING_GOAL = 0.95
OVERLAP_GOAL = 1.10
KERNEL_GOAL = 0.004
"""Relative difference of a product: the rounding of its bfloat16 result alone is 0.0017."""
LAYERS = 80
"""Of the giant, all of them."""

Found = Mapping[str, Any]


def rows_of(name: str, found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    """What a part found, beside what ``others`` did; a part that failed or was not run says why, in one row."""
    if "error" in found:
        last = str(found.get("log", "")).strip().splitlines()[-1:]
        yield Row(f"{name}: FAILED", " ".join([str(found["error"]), *last])[:110], "", False)
    elif "skipped" in found and "passed" not in found:
        yield Row(f"{name}: skipped", str(found["skipped"]))
    else:
        yield from _ROWS[name](found, others)


def _environment(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    yield Row("card", str(found.get("card", "none")))
    yield Row("driver and bus, as nvidia-smi has them", found["nvidia_smi"].splitlines()[-1][:90])
    yield Row("torch, CUDA, transformers", f"{found['torch']}, {found['cuda']}, {found['packages']['transformers']}")
    machine = found["machine"]
    yield Row("RAM that is available", f"{_gib(machine['ram_available_nbytes'])} of {_gib(machine['ram_nbytes'])}")
    yield Row("GPUDirect Storage", machine["gds"])
    yield Row("pinned upload, download", f"{_rate(found['upload_rate'])}, {_rate(found['download_rate'])}")
    yield Row("upload by the copy engine", f"{_rate(found['engine_upload_rate'])}, pinned: {_yes(found['pinned'])}")
    yield Row("pinning and first filling", _rate(found["pin_and_fill_rate"]))
    direct = "past" if found["disk_direct"] else "through"
    yield Row(f"disk ({found['scratch_filesystem']})", f"{_rate(found['disk_rate'])} {direct} the page cache")
    for package, what in found["missing"].items():
        yield Row(f"not installed: {package}", what)


def _tests(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    good = not found["failed"] and not found["broken"]
    counts = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    yield Row("tests marked cuda or gds", counts, "0 failed", good)
    for problem in found["broken"]:
        yield Row("tests: a file", problem[:90], "", False)
    for test in found["failures"]:
        yield Row("tests: failed", test[-90:], "", False)
    for reason in found["skip_reasons"]:
        yield Row("tests: skipped", reason[:90])


def _streaming(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    rate = max(found["link_rates"])
    share = found["achieved_rate"] / rate
    yield Row("streaming: pinned upload measured beside it", ", ".join(map(_rate, found["link_rates"])))
    yield Row("streaming: a pass", f"{_gib(found['streamed_nbytes'])} in {found['seconds_per_pass']:.4f} s")
    yield Row("streaming: compute alone", f"{found['compute_alone_seconds']:.4f} s")
    yield Row("streaming: achieved / pinned upload", f"{share:.3f}", f">= {STREAMING_GOAL}", share >= STREAMING_GOAL)
    yield _equal("streaming: output equal to the plain module's", found)


def _overlap(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    compute, transfer = min(found["compute_alone_seconds"]), found["transfer_alone_seconds"]
    ratio = found["seconds_per_pass"] / max(compute, transfer)
    yield Row(f"overlap, {found['rows']} rows: compute alone", f"{compute:.4f} s")
    yield Row("overlap: transfer alone", f"{transfer:.4f} s (a pass of one row: {found['thin_pass_seconds']:.4f} s)")
    yield Row("overlap: wall of a pass", f"{found['seconds_per_pass']:.4f} s")
    yield Row("overlap: wall / max(compute, transfer)", f"{ratio:.3f}", f"<= {OVERLAP_GOAL:.2f}", ratio <= OVERLAP_GOAL)
    yield _equal("overlap: output equal to the plain module's", found)


def _kernels(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    n, k = found["weights"]
    products = found["products"]
    yield Row("kernels: rate of the card's memory, copying", _rate(found["memory_rate"]))
    for name in dict.fromkeys(product["format"] for product in products):
        mine = [product for product in products if product["format"] == name]
        figures = [f"{each['rows']}: {each['roofline_seconds'] / each['seconds']:.2f}" for each in mine]
        yield Row(f"kernels: {name}, {n} x {k}, roofline / seconds by rows", ", ".join(figures))
        figures = [f"{each['rows']}: {each['plain_seconds'] / each['seconds']:.2f}" for each in mine]
        yield Row(f"kernels: {name}, plain / packed seconds by rows", ", ".join(figures))
    if found["left_out"]:
        yield Row("kernels: no time for", ", ".join(found["left_out"]))
    worst = max(product["difference"] for product in products)
    yield Row("kernels: difference from the unpacked", f"{worst:.5f}", f"<= {KERNEL_GOAL}", worst <= KERNEL_GOAL)


def _pages(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    yield Row("KV pages: of so many tokens, in bfloat16", f"{found['tokens']}, {_gib(found['raw_nbytes'])}")
    for each in found["decoded"]:
        name = each["format"] or "plain"
        transfer = each["read_nbytes"] / found["link_rate"]
        ratio = each["seconds"] / max(each["compute_seconds"], transfer)
        said = f"{each['compute_seconds']:.4f} s, {each['seconds']:.4f} s with {_gib(each['read_nbytes'])} streamed"
        yield Row(f"KV pages, {name}: a token with all in HBM, and most below", said)
        what = f"KV pages, {name}: wall / max(compute, transfer)"
        good = ratio <= OVERLAP_GOAL if found["judged"] else None  # what a tiny cache takes says nothing
        yield Row(what, f"{ratio:.3f}", f"<= {OVERLAP_GOAL:.2f}", good)
    if found["left_out"]:
        yield Row("KV pages: no time for", ", ".join(found["left_out"]))


def _disk(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    per_token = found["read_nbytes"] / len(found["seconds_each"])
    rate = max(found["disk_rates"])
    yield Row("disk: its rate, by tierstore's reader", ", ".join(map(_rate, found["disk_rates"])))
    yield Row("disk: per token", f"{found['seconds_per_token']:.3f} s, {_gib(per_token)} read")
    yield Row("disk: seconds / (bytes / disk rate)", f"{found['seconds_per_token'] / (per_token / rate):.3f}")
    yield _equal("disk: every logit equal to the plain model's", found)
    yield _budget("disk: peaks within the budget", found)


def _giant(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    rate = max(found["link_rates"])
    seconds, moved = found["seconds_per_token"], found["moved_per_token"]
    shape = f"{found['layers']} of {LAYERS} layers, {_gib(found['weights_nbytes'])}"
    yield Row("70B shape: as much as fits here", f"{shape}, hbm {_gib(found['hbm_nbytes'])}")
    yield Row("70B shape: first token, memory filled", f"{found['first_token_seconds']:.2f} s")
    yield Row("70B shape: per token", f"{seconds:.3f} s, {_gib(moved)} streamed")
    yield Row("70B shape: roofline, bytes / pinned upload", f"{moved / rate:.3f} s at {_rate(rate)}")
    yield Row("70B shape: seconds / roofline", f"{seconds / (moved / rate):.3f}")
    whole = seconds * (moved + (LAYERS - found["layers"]) * found["layer_nbytes"]) / moved
    if found["layers"] != LAYERS:
        yield Row(f"70B shape: {LAYERS} layers, by bytes (not run)", f"{whole:.3f} s per token")
    yield _budget("70B shape: peaks within the budget", found)


def _accelerate(found: Found, others: Mapping[str, Found]) -> Iterator[Row]:
    note = ", the prefill: there was time for no more" if found["only_prefill"] else ""
    yield Row("Accelerate, the same: per token", f"{found['seconds_per_token']:.3f} s{note}")
    ours = others.get("giant", {})
    if "seconds_per_token" in ours and ours["layers"] == found["layers"]:
        mine = ours["first_token_seconds"] if found["only_prefill"] else ours["seconds_per_token"]
        yield Row("Accelerate / tierstore", f"{found['seconds_per_token'] / mine:.2f}")
        count = min(len(found["digests"]), len(ours["digests"]))
        same = found["digests"][:count] == ours["digests"][:count]
        yield Row(f"70B shape: logits of {count} tokens equal to Accelerate's", _yes(same), "yes", same)


_ROWS: Mapping[str, Callable[[Found, Mapping[str, Found]], Iterator[Row]]] = {
    "environment": _environment,
    "tests": _tests,
    "streaming": _streaming,
    "overlap": _overlap,
    "kernels": _kernels,
    "pages": _pages,
    "disk": _disk,
    "giant": _giant,
    "accelerate": _accelerate,
}


def _equal(what: str, found: Found) -> Row:
    return Row(what, _yes(found["equal"]), "yes", found["equal"])


def _budget(what: str, found: Found) -> Row:
    peaks = ", ".join(f"{tier} {_gib(peak)}" for tier, peak in found["peak_bytes"].items() if peak)
    return Row(what, peaks, "yes", found["within_budget"])


def _yes(good: bool) -> str:
    return "yes" if good else "no"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 2**30:.2f} GiB/s"


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:.2f} MiB"
