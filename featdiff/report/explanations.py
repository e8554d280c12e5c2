"""An explanation -> a picture for people and a JSON file beside it."""

from __future__ import annotations

import json
from pathlib import Path

from ..exceptions import FeatdiffError
from ..files.atomic import write_together
from ..files.text import for_json
from ..verdicts.explanation import Explanation
from .explanation_page import draw


def save_explanation(folder: str | Path, name: str, explanation: Explanation) -> list[Path]:
    """Write ``name.png`` and ``name.json``, both or neither; of an image that could not be read the JSON file alone.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    name : str
    explanation : Explanation

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    FeatdiffError
        The disk is full or the place cannot be written.
    """
    place = Path(folder)
    lines = json.dumps(explanation.to_json(), ensure_ascii=False, indent=2).split("\n")
    text = "".join(f"{for_json(line)}\n" for line in lines)
    contents = {place / f"{name}.json": text.encode()}
    if explanation.status == "ok":
        contents[place / f"{name}.png"] = draw(explanation)
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_together(contents)
    except OSError as error:
        raise FeatdiffError(f"{place / name} cannot be written: {error.strerror or error}") from None
    return list(contents)
