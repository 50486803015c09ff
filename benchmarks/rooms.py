"""How long a procedural room takes, stage by stage: python benchmarks/rooms.py [--seeds 8] [--json rooms.json]

Medians over the seeds, in milliseconds, with one and with two threads, after a warm-up that compiles the loops. No peer
draws such frames in a Python process; the goal is a 640x480 frame in under a second on two cores. On a busy machine
look at the row of CPU time, which counts only our own work, of all threads together.
"""

import argparse
import json
import os
import platform
import time

import numpy as np

from enfilade.data import room_render, room_scene, room_voxels

STAGES = ("build", "trace", "shadows", "bounce", "filter", "shade", "edges", "camera")


def measure(seed: int, width: int, height: int, threads: int) -> dict[str, float]:
    """Seconds of each stage, of the frame and of the volume, and the size of the room."""
    start, work = time.perf_counter(), time.process_time()
    scene = room_scene.build(seed, width, height, threads=threads)
    built = time.perf_counter()
    frame = room_render.render(scene, np.random.default_rng([seed, 1]))
    rendered, work = time.perf_counter(), time.process_time() - work
    room_voxels.voxelise(scene)
    return {
        "build": built - start,
        **frame.seconds,
        "frame": rendered - start,
        "frame, CPU": work,
        "voxels": time.perf_counter() - rendered,
        "triangles": len(scene.faces),
        "objects": len(scene.object_labels),
        "lights": len(scene.lights),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--json")
    options = parser.parse_args()
    width, height = options.size
    measure(0, 64, 48, 2)
    table = {}
    for threads in (1, 2):
        runs = [measure(seed, width, height, threads) for seed in range(options.seeds)]
        table[threads] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        table[threads]["slowest frame"] = max(run["frame"] for run in runs)
    sizes = table[2]
    print(f"{width}x{height}, median of {options.seeds} rooms: {sizes['triangles']:.0f} triangles,", end=" ")
    print(f"{sizes['objects']:.0f} objects, {sizes['lights']:.0f} lights; {os.cpu_count()} cores, {platform.machine()}")
    print(f"{'ms':14s}{'1 thread':>10s}{'2 threads':>11s}")
    for key in (*STAGES, "frame", "frame, CPU", "slowest frame", "voxels"):
        print(f"{key:14s}{1000 * table[1][key]:10.0f}{1000 * table[2][key]:11.0f}")
    if options.json:
        record = {"width": width, "height": height, "seeds": options.seeds, "cores": os.cpu_count(), "threads": table}
        temporary = f"{options.json}.part"
        with open(temporary, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
