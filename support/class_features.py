"""Class features that another program made."""

import numpy as np
import torch
import torch.nn.functional as F

from support import InputError


def read_class_features(path: str, clip, class_names) -> torch.Tensor:
    """Class features (C, D) of any other prompt method, from a .npy file; made unit-norm.

    clip: a `Clip` of common.py.

    Raises: InputError if the file is not one such array, with a row that is not 0 for each class.
    """
    shape = tuple(clip.class_features(class_names).shape)
    need = f"needed is a {shape} array in .npy, a row for each of {', '.join(class_names)}"
    try:
        given = np.load(path)
        features = torch.from_numpy(given).float()
    except OSError as error:
        raise InputError(f"--class-features {path}: {error.strerror or error}; {need}") from None
    except (ValueError, TypeError, AttributeError, EOFError):  # numpy would advise to run a pickle
        raise InputError(f"--class-features {path}: no array of numbers; {need}") from None
    wrong = None
    if features.shape != shape:
        wrong = f"its shape is {tuple(features.shape)}"
    elif not features.isfinite().all():
        wrong = "not all of its numbers are finite"
    elif not features.norm(dim=1).all():
        wrong = "a row of it is 0"
    if wrong:
        raise InputError(f"--class-features {path}: {wrong}; {need}")
    return F.normalize(features, dim=-1).to(clip.device)
