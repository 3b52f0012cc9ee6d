# SPDX-License-Identifier: Apache-2.0
"""Relative quantization error of every weight scheme on random matrices, largest first: python bench/schemes.py."""

import argparse

import numpy as np

from cnllama import _core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--cols", type=int, default=4096)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (args.rows, args.cols)
    weights = {
        "normal": rng.standard_normal(shape, dtype=np.float32),
        "student-t 4": rng.standard_t(4, shape).astype(np.float32),
        "laplace": rng.laplace(size=shape).astype(np.float32),
    }
    print("| scheme | bits per weight | " + " | ".join(weights) + " |")
    print("|---|---|" + "---|" * len(weights))
    for scheme, facts in sorted(_core.schemes().items(), key=lambda item: -item[1]["bits_per_weight"]):
        errors = []
        for matrix in weights.values():
            _, squared_error, squares = _core.quantize(matrix, scheme)
            errors.append(f"{np.sqrt(squared_error / squares):.4f}")
        print(f"| {scheme} | {facts['bits_per_weight']:g} | " + " | ".join(errors) + " |")


if __name__ == "__main__":
    main()
