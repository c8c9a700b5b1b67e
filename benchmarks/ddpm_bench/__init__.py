"""Is it good, is it likely, is it fast: each number with the command that made it.

Files, one idea each:
    judge.py            the shipped classifier that looks at images (ONNX, no PyTorch)
    frechet.py          Fréchet distance between Gaussian fits
    kernel_distance.py  KID, the unbiased kernel distance
    quality.py          images against held-out images, and real images against the same
    likelihood.py       bits per dimension by the variational bound
    data.py             real images for all of them
    report.py           on what, with what, by which command; JSON
    plots.py            curves, where matplotlib is installed
    *_command.py        one sub-command of ddpm-bench each; cli.py registers them
    judge_train.py      how the judge was made (PyTorch; nothing else here needs it)
"""
