"""Sums by torch that are the same in every run."""


def be_exact(threads: int = 1) -> None:
    """Set torch to full fp32 and to the same sums in every run, for as long as the process lives.

    Args:
        threads: of the CPU. Several may share out sums by their number.
    """
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
