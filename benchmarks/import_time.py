"""How long `import polyrank` takes beside `import torch`: fresh processes, in turn, medians of same-round ratios.

python benchmarks/import_time.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    for module in ("torch", "polyrank"):
        seconds(module)  # fill the file cache
    pairs = [(seconds("torch"), seconds("polyrank")) for _ in range(rounds)]
    ratios = [ours / theirs for theirs, ours in pairs]
    print(f"import torch     {statistics.median(t for t, _ in pairs):.2f} s (median of {rounds})")
    print(f"import polyrank  {statistics.median(p for _, p in pairs):.2f} s")
    print(f"ratio            {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
