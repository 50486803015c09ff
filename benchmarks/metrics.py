"""Scoring one 640x480 frame of 40 classes: enfilade.metrics against torchmetrics, torch and numpy.

    python benchmarks/metrics.py --threads 1 --json metrics.json

Run it on an idle machine: torch with two threads on busy cores is several times slower. Every row scores
the same frame; before it is timed, its result is compared with ours.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

K, H, W = 40, 480, 640


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def median_ms(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def frame(np):
    """Labels in patches, as real ones are; a fifth of the pixels wrong, a tenth ignored; logits that say the same."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, K, (H // 20, W // 20)).repeat(20, 0).repeat(20, 1)
    pred = np.where(rng.random((H, W)) < 0.2, rng.integers(0, K, (H, W)), truth)
    logits = rng.standard_normal((K, H, W)).astype(np.float32)
    np.put_along_axis(logits, pred[None], 9, 0)
    truth[rng.random((H, W)) < 0.1] = 255
    depth = rng.uniform(0.5, 9.5, (H, W)).astype(np.float32)
    estimate = (depth * np.exp(rng.normal(0, 0.1, (H, W)))).astype(np.float32)
    return pred, truth, logits, estimate, depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, and of our threaded row")
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()

    import numpy as np
    import torch
    import torchmetrics
    from torchmetrics import classification, regression

    from enfilade.metrics import DEPTH_KEYS, DepthScore, argmax_confusion, confusion

    torch.set_num_threads(args.threads)
    pred, truth, logits, estimate, depth = frame(np)
    pred8, truth8 = pred.astype(np.uint8), truth.astype(np.uint8)
    tpred, ttruth, tlogits = torch.from_numpy(pred), torch.from_numpy(truth), torch.from_numpy(logits)[None]
    expected = confusion(pred8, truth8, K)

    def torchmetrics_confusion(validate, from_logits=False):
        metric = classification.MulticlassConfusionMatrix(K, ignore_index=255, validate_args=validate)
        source, target = (tlogits, ttruth[None]) if from_logits else (tpred, ttruth)

        def run():
            metric.reset()
            metric.update(source, target)
            return metric.confmat.numpy()

        return run

    def torch_bincount():
        valid = ttruth != 255
        return torch.bincount(ttruth[valid] * K + tpred[valid], minlength=K * K).view(K, K).numpy()

    def numpy_bincount():
        valid = truth8 != 255
        index = truth8[valid].astype(np.uint16) * np.uint16(K) + pred8[valid]
        return np.bincount(index, minlength=K * K).reshape(K, K)

    labels = [
        ("torchmetrics", torchmetrics_confusion(True)),
        ("torchmetrics, no validation", torchmetrics_confusion(False)),
        ("torch.bincount", torch_bincount),
        ("numpy.bincount, 8 bit", numpy_bincount),
        ("enfilade, 64 bit", lambda: confusion(pred, truth, K)),
        ("enfilade, 8 bit", lambda: confusion(pred8, truth8, K)),
    ]
    scores = [
        ("torchmetrics", torchmetrics_confusion(True, True)),
        ("torchmetrics, no validation", torchmetrics_confusion(False, True)),
        ("torch argmax, enfilade count", lambda: confusion(tlogits[0].argmax(0).numpy(), truth8, K)),
        ("numpy argmax, enfilade count", lambda: confusion(logits.argmax(0), truth8, K)),
        ("enfilade fused, 1 thread", lambda: argmax_confusion(logits, truth8)),
    ]
    if args.threads > 1:
        threaded = f"enfilade fused, {args.threads} threads"
        scores.append((threaded, lambda: argmax_confusion(logits, truth8, threads=args.threads)))
    for _, run in labels + scores:
        np.testing.assert_array_equal(run(), expected)

    testimate, tdepth = torch.from_numpy(estimate), torch.from_numpy(depth)
    mean_squared = {"rmse": regression.MeanSquaredError(squared=False), "log": regression.MeanSquaredError()}
    absolute_relative = regression.MeanAbsolutePercentageError()

    def torchmetrics_three():
        """The three of our ten that torchmetrics has."""
        for metric in (*mean_squared.values(), absolute_relative):
            metric.reset()
        valid = (tdepth > 0) & (tdepth <= 10)
        p, t = testimate[valid].clamp(1e-3, 10), tdepth[valid]
        mean_squared["rmse"].update(p, t)
        mean_squared["log"].update(p.log(), t.log())
        absolute_relative.update(p, t)
        values = mean_squared["rmse"].compute(), mean_squared["log"].compute().sqrt(), absolute_relative.compute()
        return [float(v) for v in values]

    def torch_ten():
        valid = (tdepth > 0) & (tdepth <= 10)
        p, t = testimate[valid].clamp(1e-3, 10), tdepth[valid]
        ratio, log, error = torch.maximum(p / t, t / p), p.log() - t.log(), p - t
        means = [(ratio < 1.25**i).float().mean() for i in (1, 2, 3)]
        means += [(error.abs() / t).mean(), (error.square() / t).mean(), error.square().mean().sqrt()]
        means += [log.square().mean().sqrt(), log.std(correction=0), log.var(correction=0)]
        means += [(p.log10() - t.log10()).abs().mean()]
        return [float(v) for v in means]

    def enfilade_ten():
        score = DepthScore()
        score.update(estimate, depth)
        return [score.compute()[key] for key in DEPTH_KEYS]

    ours = dict(zip(DEPTH_KEYS, enfilade_ten()))
    np.testing.assert_allclose(torch_ten(), list(ours.values()), rtol=1e-4)  # torch sums in float32
    three = [ours[key] for key in ("rmse", "rmse_log", "abs_rel")]
    np.testing.assert_allclose(torchmetrics_three(), three, rtol=1e-4)
    depths = [
        ("torchmetrics, 3 of the 10 scores", torchmetrics_three),
        ("torch, all 10", torch_ten),
        ("enfilade, all 10", enfilade_ten),
    ]

    head = f"{hardware()}; torch {torch.__version__}, torchmetrics {torchmetrics.__version__}; {datetime.date.today()}"
    print(head)
    result = {"hardware": head, "threads": args.threads, "repeats": args.repeats, "rows": []}
    for job, rows in {"labels -> confusion": labels, "logits -> confusion": scores, "depth": depths}.items():
        print(f"\n{job + ', 640x480':38s} {'ms':>8s} {'ratio to torchmetrics':>22s}")
        base = None
        for name, run in rows:
            ms = median_ms(run, args.repeats)
            base = base or ms
            print(f"{name:38s} {ms:8.2f} {base / ms:22.1f}")
            result["rows"].append({"job": job, "name": name, "ms": ms, "ratio": base / ms})
    if args.json:
        temporary = args.json.with_name(args.json.name + ".part")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
