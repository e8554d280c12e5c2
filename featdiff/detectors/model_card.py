"""The config of a saved detector -> a model card for the Hugging Face hub, from what is known; no network is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..exceptions import UsageError
from ..verdicts.calibration import smallest_rate

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Tells whether {{ things }} are like those that it was trained on (in-domain) or not (out-of-distribution, OOD).
A model of [featdiff](https://github.com/featdiff/featdiff) {{ version }}: it gives each of them an `ood_score`,
a conformal p-value and a verdict. {{ names }}

## Use

```bash
pip install featdiff
featdiff score {{ given }} -m {{ name }}
```

```python
{{ code }}
```

Meant for: finding inputs that another model was not made for, sorting out odd {{ things }} before people look at them,
and watching whether what comes in still is what it was.

Not meant for: deciding alone about people or about safety, or telling *what* an odd one is.

## What it is

| | |
|---|---|
{% for label, value in facts.items() -%}
| {{ label }} | {{ value }} |
{% endfor %}
{% if held -%}
**The files hold {{ held }} of training images.** Who can read this repository can read those.

{% endif -%}
## False alarms

P-values are ranks among {{ calibration }} held-out {{ things }}{{ in_groups }}. So false-alarm rates from
{{ least }} up are possible; the default is {{ fpr }}: about that share of *ordinary* {{ things }} is flagged.

## Measured
{% if pairs %}
| OOD set | protocol | in-domain | OOD | AUROC (95 % interval) | FPR@95TPR |
|---|---|---|---|---|---|
{% for pair in pairs -%}
| {{ pair.ood }} | {{ pair.protocol }} | {{ pair.n_id }} | {{ pair.n_ood }} | {{ pair.auroc }} | {{ pair.fpr95 }} |
{% endfor -%}
{% endif -%}
{% if self_check %}
Self-check: {{ self_check }} of synthetic outliers near the training images are flagged. No real OOD image was seen for
this; a low number means that something is wrong, a high one promises nothing.
{% endif -%}
{% if not pairs and not self_check %}
Nothing is known here. `featdiff eval --id TEST/ --ood NAME=OTHERS/ -m {{ name }}` measures it on your own data.
{% endif %}
## Limits

- The rate of false alarms holds for {{ things }} that come from where the held-out ones came from (exchangeability).
  After a change of camera, season, site or preparation it does not: train again, or calibrate on new ones.
- The training {{ things }} themselves look more ordinary than they are, because the model has met them.
- Near OOD (another kind of the same thing, a small defect) is harder than far OOD, and is missed more often.
- What was odd in the training data counts as ordinary. Bias of the {{ source }} is inherited.
- An OOD verdict says that something differs, not that it is bad; an in-domain verdict is no guarantee.
"""
# What a detector looks at, and how it is loaded, by mode.
_WORDS = {
    "feature": {"things": "images", "given": "IMAGES", "kind": "Detector", "source": "backbone"},
    "joined": {"things": "images", "given": "IMAGES", "kind": "JoinedDetector", "source": "backbones"},
    "pixel": {"things": "images", "given": "IMAGES", "kind": "PixelDetector", "source": "diffusion model"},
    "vectors": {
        "things": "rows",
        "given": "--features ROWS.npy",
        "kind": "FeatureDiffusion",
        "source": "network that made the vectors",
    },
}
_CODE = 'from featdiff import {kind}\n\ndetector = {kind}.from_pretrained("{name}")'
_CODE_OF_STUDENT = """from featdiff.hardening.harden import load_hardened

classifier, guard = load_hardened("{name}")
logits, verdict = guard(images)  # (B, 3, H, W), prepared by classifier.transform"""
_TAGS = ["featdiff", "out-of-distribution-detection", "anomaly-detection", "conformal-prediction"]


def model_card(
    config: Mapping[str, Any],
    name: str,
    *,
    license: str | None = None,
    results: Mapping[str, Any] | None = None,
    held: str = "",
    student: Mapping[str, str] | None = None,
) -> str:
    """Write a model card.

    Parameters
    ----------
    config : mapping
        The ``config.json`` of a saved detector of any mode, or of a guard.
    name : str
        ``org/name`` on the hub.
    license : str, optional
        Of the model, by the hub's names (``apache-2.0`` ...); default: none is named.
    results : mapping, optional
        The JSON of ``featdiff eval --json``; ``"self_check"`` may stand beside it, a share in [0, 1].
    held : str, default ""
        What the model holds of its training images beside features, in words.
    student : mapping, optional
        Rows of the table about the classifier that the guard belongs to, where it lies beside it.

    Returns
    -------
    str
        Markdown with the hub's YAML header.

    Raises
    ------
    UsageError
        Results that are not those of ``featdiff eval``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    pairs, self_check = _measured(results or {})
    mode = str(config["mode"])
    origin: dict[str, Any] = {"timm": True} if student else _origin(config)
    words = _WORDS[mode]
    header = ModelCardData(
        library_name="featdiff",
        license=license,
        base_model=origin.get("base_model"),
        tags=[*_TAGS, *(["timm"] if origin.get("timm") else [])],
        model_name=name if pairs else None,
        eval_results=[result for pair in pairs for result in _for_the_hub(pair)] or None,
    )
    groups = config["images"]["calibration_groups"]
    calibration = config["images"]["calibration"]
    card = ModelCard.from_template(
        header,
        template_str=_TEMPLATE,
        name=name,
        version=config["featdiff_version"],
        facts={label: _cell(value) for label, value in _facts(config, origin, student).items()},
        names="It guards a classifier, which names classes." if student else "It names no classes.",
        code=(_CODE_OF_STUDENT if student else _CODE).format(name=name, kind=words["kind"]),
        held=held,
        calibration=f"{calibration:,}",
        in_groups=f" in {groups:,} groups" if groups < calibration else "",
        least=smallest_rate(groups),
        fpr=f"{_fpr(config):g}",
        pairs=[_row(pair) for pair in pairs],
        self_check=self_check,
        **words,
    )
    return str(card)


def _fpr(config: Mapping[str, Any]) -> float:
    return float(config["fpr"] if config["mode"] == "vectors" else config["settings"]["fpr"])


def _origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the pretrained network behind a detector: ``base_model`` on the hub, ``license``, ``papers``."""
    settings = config["settings"]
    if config["mode"] == "pixel":
        source = settings.get("pretrained")
        on_hub = isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))
        return {"base_model": source} if on_hub else {}
    if config["mode"] != "feature" or config["backbone"]["source"] not in ("embedded", "hub"):
        return {}

    backbone = str(settings["backbone"])
    if backbone.startswith("hf-hub:"):
        return {"base_model": backbone.removeprefix("hf-hub:").partition("@")[0], "timm": True}
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(config["backbone"]["tag"])
    if known is None:
        return {"timm": True}
    return {"base_model": known.hf_hub_id, "license": known.license, "papers": known.paper_ids, "timm": True}


def _facts(config: Mapping[str, Any], origin: Mapping[str, Any], student: Mapping[str, str] | None) -> dict[str, str]:
    """Rows of the table of facts; what a guard looks through is its classifier."""
    images = config["images"]
    what = "rows" if config["mode"] == "vectors" else "images"
    facts = {"mode": str(config["mode"])}
    if student:
        facts |= student
    elif config["mode"] == "feature":
        backbone = config["backbone"]
        facts |= {
            "backbone": f"{backbone['tag']} ({backbone['source']}); its weights are not in this repository",
            "licence of the backbone": _text(origin.get("license")) or "not known here: look it up before you use it",
            "paper of the backbone": _text(origin.get("papers")),
            "SHA-256 of its weights": backbone["fingerprint"],
        }
    for i, encoder in enumerate(config.get("encoders", ())):
        backbone = encoder["backbone"]
        facts[f"backbone {i + 1}"] = f"{backbone['tag']} ({backbone['source']}), SHA-256 {backbone['fingerprint']}"
        facts[f"layers {i + 1}"] = ", ".join(f"{name} ({width})" for name, width in encoder["layers"].items())
    if config["mode"] == "joined":
        facts["joined by"] = f"{config['settings']['join']}; the backbones' weights are not in this repository"
    elif config["mode"] == "pixel":
        facts["diffusion model"] = _text(config["settings"].get("pretrained")) or "trained on these images"
    else:
        facts["layers"] = ", ".join(f"{name} ({width})" for name, width in config["layers"].items())

    facts |= {
        "trained on": f"{images['different']:,} different {what}, in {config['training_seconds']:.0f} s",
        "calibrated on": f"{images['calibration']:,} held-out {what}",
        "neighbours": f"{images['bank']:,} in-domain {what}" if images.get("bank") else "",
        "format": f"{config['format_version']}, digest SHA-256 {config['digest']}",
    }
    return {label: value for label, value in facts.items() if value}


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


# ---- what was measured ----


def _measured(results: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str]:
    """Pairs of an evaluation, and the share of a self-check in words (``UsageError`` if it is neither)."""
    try:
        pairs = list(results.get("pairs", ()))
        for pair in pairs:
            _row(pair)
        share = results.get("self_check")
        in_words = "" if share is None else _percent(share)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError("results are not what featdiff eval --json writes", argument="results") from None
    if results and not pairs and not in_words:
        raise UsageError("results hold no pairs: they are not what featdiff eval --json writes", argument="results")
    return pairs, in_words


def _percent(share: Any) -> str:
    """A share in [0, 1] in percent (``ValueError`` if it is none)."""
    if not 0 <= float(share) <= 1:
        raise ValueError(share)
    return f"{100 * share:.1f} %"


def _row(pair: Mapping[str, Any]) -> dict[str, str]:
    """A pair of sets as cells of the table."""
    own = pair["heads"]["featdiff"]
    low, high = own["auroc_ci"]
    return {
        "ood": _cell(str(pair["ood"])),
        "protocol": _cell(str(pair["protocol"])),
        "n_id": f"{int(pair['n_id']):,}",
        "n_ood": f"{int(pair['n_ood']):,}",
        "auroc": f"{_percent(own['auroc'])} ({_percent(low)} to {_percent(high)})",
        "fpr95": _percent(own["fpr95"]),
    }


def _for_the_hub(pair: Mapping[str, Any]) -> list[Any]:
    """The same as entries of the header, which the hub shows beside the card."""
    from huggingface_hub import EvalResult

    own = pair["heads"]["featdiff"]
    return [
        EvalResult(
            task_type="out-of-distribution-detection",
            dataset_type=re.sub(r"[^\w.-]+", "_", str(pair["ood"])),
            dataset_name=f"{pair['ood']} ({pair['protocol']})",
            dataset_config=str(pair["protocol"]),
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(own[key]), 4),
        )
        for kind, label, key in (("roc_auc", "AUROC", "auroc"), ("fpr95", "FPR@95TPR", "fpr95"))
    ]
