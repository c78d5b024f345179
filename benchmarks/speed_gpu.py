"""The rows of `speed.py` for a GPU; on a CPU they run too, without a graph, and tell less."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from speed_cpu import Row, correctness
from speed_detectors import inference_network, load_ours, paper_weights, sample_inputs
from speed_timing import (
    Bench,
    Finding,
    Work,
    milliseconds,
    number,
    rate,
    spread,
    take_turns,
)
from speed_training import train_steps
from torch import Tensor, nn

from refinedet_cli.core.detector import Detector
from refinedet_cli.core.postprocess import Attempt, try_suppress
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.network_facts import multiply_adds

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")


def forward(bench: Bench) -> Iterator[Finding]:
    """The network beside the fastest matrix product that this machine has."""
    detector = load_ours(str(paper_weights(bench)))
    operations = 2 * multiply_adds(detector.config)
    matrices = [_product(bench, side) for side in bench.sizes.matrices]
    for precision in PRECISIONS:
        network = inference_network(detector, bench.device, precision)
        for batch in sorted({1, bench.sizes.batch}, reverse=True):
            inputs = sample_inputs(bench, detector, batch).to(bench.device)
            sides: dict[str, Work] = {"network": lambda inputs=inputs, network=network: infer(network, inputs)}
            judged = precision == "bf16" and batch == bench.sizes.batch
            if judged:
                sides |= {f"product {side}": work for side, work in matrices}
            seconds = take_turns(bench, sides)
            yield _against_peak(bench, detector, precision, batch, seconds, operations)


def _against_peak(
    bench: Bench,
    detector: Detector,
    precision: Precision,
    batch: int,
    seconds: dict[str, tuple[float, ...]],
    operations: int,
) -> Finding:
    own = seconds["network"]
    speeds = [batch * operations / value / 1e12 for value in own]
    work = f"network, {detector.config.preset}, {precision}, {batch} at once"
    ours = f"{rate(own, batch)}\n{number(spread(speeds).median)} TFLOP/s"
    products = {int(name.split()[1]): values for name, values in seconds.items() if name != "network"}
    if not products:
        return Finding(work=work, ours=ours, figure=milliseconds(own), unit="ms", seconds=seconds)
    # The side at which this machine is fastest.
    side = max(products, key=lambda side: side**3 / spread(products[side]).median)
    peaks = [2 * side**3 / value / 1e12 for value in products[side]]
    return Finding(
        work=f"{work}, of the peak",
        ours=ours,
        theirs=f"{number(spread(peaks).median)} TFLOP/s\nbf16 product of {side:,} x {side:,}",
        figure=spread([100 * speed / peak for speed, peak in zip(speeds, peaks, strict=True)]),
        unit="%",
        target=40.0,
        seconds=seconds,
        facts={"multiply_adds_a_picture": operations // 2},
    )


def _product(bench: Bench, side: int) -> tuple[int, Work]:
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(left)
    return side, lambda: torch.mm(left, right, out=result)


def infer(network: nn.Module, inputs: Tensor) -> Any:
    """Run a network as `Predictor` does."""
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        return network(inputs)


def graph(bench: Bench) -> Iterator[Finding]:
    """One picture through network, decoder and suppression, in a single launch."""
    detector = load_ours(str(paper_weights(bench)))
    for precision in PRECISIONS:
        network = inference_network(detector, bench.device, precision)
        inputs = sample_inputs(bench, detector, 1).to(bench.device)
        whole = _whole(detector, network, inputs)
        sides = {"ours": _each_alone(capture(whole, bench.device), bench)}
        is_captured = bench.device.type == "cuda"
        if is_captured:
            sides["launched one by one"] = _each_alone(whole, bench)
        seconds = take_turns(bench, sides)
        times = [f"{number(milliseconds(values).median)} ms" for values in seconds.values()]
        yield Finding(
            work=f"one picture to detections, {detector.config.preset}, {precision}"
            + (", CUDA graph" if is_captured else ", without a graph"),
            ours=times[0],
            theirs=f"{times[1]}\nlaunched one by one" if is_captured else "",
            figure=milliseconds(seconds["ours"]),
            unit="ms",
            target=1.5 if precision == "bf16" else None,
            sense="under",
            seconds=seconds,
        )


def _whole(detector: Detector, network: nn.Module, inputs: Tensor) -> Work:
    return lambda: attempt(detector, infer(network, inputs))


@torch.inference_mode()
def attempt(detector: Detector, raw: Any) -> Attempt:
    """Do what `Predictor` does after the network, up to where it fetches what was found."""
    return try_suppress(detector.decoder(raw), detector.config.postprocess)


def _each_alone(work: Work, bench: Bench) -> Work:
    """Wait after every call, as somebody does who needs the answer before the next picture."""

    def call() -> None:
        work()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)

    return call


def capture(work: Work, device: torch.device) -> Work:
    """Record some work on a GPU as a graph, which is launched as a whole; on a CPU it stays as it is."""
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(aside)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        kept = work()

    def replay() -> object:
        recorded.replay()
        return kept

    return replay


def postprocess(bench: Bench) -> Iterator[Finding]:
    """Decoder and suppression of a batch, and how often they make the program wait for the GPU."""
    detector = load_ours(str(paper_weights(bench)))
    network = inference_network(detector, bench.device, "bf16")
    raw = infer(network, sample_inputs(bench, detector, bench.sizes.batch).to(bench.device))
    settled = bool(attempt(detector, raw).settled)

    def work() -> object:
        return attempt(detector, raw)

    waits = count_syncs(work, bench.device)
    sides = {"ours": work}
    if bench.device.type == "cuda" and not waits:
        sides["graph"] = capture(work, bench.device)
    seconds = take_turns(bench, sides)
    fastest = min(seconds, key=lambda name: spread(seconds[name]).median)
    yield Finding(
        work=f"post-processing of {bench.sizes.batch} pictures" + (", CUDA graph" if fastest == "graph" else ""),
        ours=", ".join(
            f"{number(milliseconds(v).median)} ms{' as a graph' * (n == 'graph')}" for n, v in seconds.items()
        ),
        figure=milliseconds(seconds[fastest]),
        unit="ms",
        target=0.5,
        sense="under",
        seconds=seconds,
        facts={"settled_at_once": settled},
    )
    if waits is not None:
        yield Finding(
            work="waits for the GPU in it", ours=f"{waits}", figure=spread([float(waits)]), unit="", target=0.0,
            sense="at most",
        )  # fmt: skip


def count_syncs(work: Work, device: torch.device) -> int | None:
    """Count how often some work makes the program wait for a GPU; None on a CPU, where there is no such thing."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def training(bench: Bench) -> Iterator[Finding]:
    """Steps of the paper's recipe."""
    for precision in PRECISIONS:
        for batch in sorted({1, bench.sizes.batch}, reverse=True):
            steps = train_steps(bench, bench.sizes.paper, batch, precision=precision)
            judged = precision == "bf16" and batch == bench.sizes.batch
            yield Finding(
                work=f"training step, {bench.sizes.paper}, {precision}, {batch} pictures in memory",
                ours=f"{rate(steps.seconds, batch)}\n{number(milliseconds(steps.seconds).median)} ms",
                figure=spread([batch / value for value in steps.seconds]),
                unit="/s",
                target=1000.0 if judged else None,
                seconds={"step": steps.seconds},
            )


ROWS: dict[str, Row] = {
    "forward": forward,
    "graph": graph,
    "postprocess": postprocess,
    "training": training,
    "correctness": correctness,
}
