"""The hub of `datasets`: whether it has a data set, and its rows, downloaded now or found where an earlier download is.

Where a batch comes from: `datasets.load` and `text.load_text` ask here for what is no file of the user's. `datasets`
and `huggingface_hub` are imported when that happens and not before.
"""

from __future__ import annotations

from typing import Any

from labkit.errors import DataNotFound
from labkit.suggest import did_you_mean

HUB_NAMES = {"mnist": "ylecun/mnist"}  # short names of ours
HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach


def from_hub(dataset: str, subset: str | None = None, *, files: str = "its parquet files") -> tuple[str, Any]:
    """A data set of the hub, or its copy in the cache of an earlier download.

    Args:
        dataset: Its name, or a short one of ours.
        subset: Which of its configurations, if it has several.
        files: What a folder would have to hold instead, for errors.

    Returns:
        Its full name, and what `datasets.load_dataset` returns.

    Raises:
        DataNotFound: The hub has no such data set, or is out of reach and there was no earlier download.
        ValueError: The data set has several configurations, or not this one.
    """
    import datasets

    name = HUB_NAMES.get(dataset, dataset)
    hint = "" if dataset in HUB_NAMES else did_you_mean(dataset, ["digits", *HUB_NAMES])
    reachable = _hub_has(name, hint)
    offline_before = datasets.config.HF_HUB_OFFLINE
    # Offline, `datasets` looks into its cache at once; without this it tries the hub for half a minute first.
    datasets.config.HF_HUB_OFFLINE = offline_before or not reachable
    try:
        return name, datasets.load_dataset(name) if subset is None else datasets.load_dataset(name, subset)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        if reachable:
            raise DataNotFound(f"the hub's data set {name!r} could not be downloaded: {error}") from error
        raise DataNotFound(
            f"the hub cannot be reached for the data set {name!r}, and no earlier download of it is on this machine; "
            f"name a folder with {files}: data_dir=…{hint}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline_before


def _hub_has(name: str, hint: str) -> bool:
    """Whether the hub answers for this data set: False if it is out of reach. Raises `DataNotFound` if it has none."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 404)
        if status >= 500:
            return False
        raise DataNotFound(
            f"the hub has no data set {name!r} (or not for you, status {status}); labkit itself knows digits and "
            f"mnist{hint}"
        ) from error
    except Exception:  # whichever HTTP library is under it today: no name, no route, refused, too slow, offline mode
        return False
    return True
