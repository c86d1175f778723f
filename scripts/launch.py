"""Runs the points of an experiment file's sweep() on TPU VMs, or writes a cluster's job file.

python -m scripts.launch experiments/dpo.py --workdir gs://BUCKET/sweep --tpu v5p-128 --zone ZONE
"""

import sys

from dpo_jax import launch

if __name__ == "__main__":
    sys.exit(launch.main(sys.argv[1:], "python -m scripts.launch"))
