"""Clients against `ds-gradprune serve`, or against transformers' server on the same model.

    python benchmarks/serve.py --clients 16 --model runs/first/model
    python benchmarks/serve.py --clients 16 --model runs/first/model --server transformers

What limits: a token of one reply reads every weight from memory, and a batch reads them once for
all its replies. The last line of stdout is one JSON document: tokens_per_s, ttft_p95_s, dropped
(neither reply nor refusal), refused (429 with Retry-After), errors, rss_mb (the most in use).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from labs.serve import main

    sys.exit(main())
