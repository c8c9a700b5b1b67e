"""From a trained network to an engine that has proved itself; see :mod:`ddpm_export.pipeline`.

Importing this package loads no PyTorch: the command must be able to say that it is missing.
"""
