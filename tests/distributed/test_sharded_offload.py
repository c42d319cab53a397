"""FSDP2's CPUOffloadPolicy under every optimizer, and what `offload` refuses of what is divided over ranks."""

from ranks import run_ranks

REFUSED = {
    "sharded": "RuntimeError: `params[0]` of shape (8, 6) is sharded; let FSDP2 keep it on the CPU",
    "DDP": "TypeError: DistributedDataParallel reduces gradients over ranks after they have come",
}


def test_shards_on_the_cpu(tmp_path):
    for results in run_ranks("cases_offload", 2, tmp_path):
        for name, result in results.items():
            if name in REFUSED:
                assert result["error"].startswith(REFUSED[name]), name
            else:
                assert result is True, (name, result)
