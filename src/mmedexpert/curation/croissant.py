"""Croissant metadata of a released set: its files, columns, and what the responsible-AI vocabulary asks.

Croissant 1.1 (MLCommons, 2026) with RAI 1.0. Written by hand as JSON-LD; a test validates it with `mlcroissant`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.curation import datasheet
from mmedexpert.runtime.runs import write_json

CROISSANT = "croissant.json"
VERSION = "1.0.0"  # of the metadata's form; a release is told apart by its files' hashes
# the standard's own context, word by word
CONTEXT: Mapping[str, Any] = {
    "@language": "en", "@vocab": "https://schema.org/", "arrayShape": "cr:arrayShape", "citeAs": "cr:citeAs",
    "column": "cr:column", "conformsTo": "dct:conformsTo", "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/", "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty", "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract", "field": "cr:field", "fileObject": "cr:fileObject", "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet", "format": "cr:format", "includes": "cr:includes", "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath", "key": "cr:key", "md5": "cr:md5",
    "name": {"@container": "@language"}, "parentField": "cr:parentField", "path": "cr:path",
    "recordSet": "cr:recordSet", "references": "cr:references", "regex": "cr:regex", "repeated": "cr:repeated",
    "replace": "cr:replace", "samplingRate": "cr:samplingRate", "sc": "https://schema.org/",
    "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField", "transform": "cr:transform",
}  # fmt: skip


def write_croissant(
    folder: Path, *, summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], teacher: str | None
) -> Path:
    """Write `croissant.json` to a released folder; `summary` is its `release.json`, `steps` the funnel's counts."""
    files = [
        {
            "@type": "cr:FileObject", "@id": path, "name": path, "contentUrl": path, "sha256": facts["sha256"],
            "contentSize": f"{facts['bytes']} B", "encodingFormat": "application/x-parquet",
        }
        for path, facts in summary["files"].items()
    ]  # fmt: skip
    files += [
        {
            "@type": "cr:FileSet", "@id": f"{split}-files", "name": f"{split}-files",
            "includes": f"data/{split}-*.parquet", "encodingFormat": "application/x-parquet",
        }
        for split in summary["splits"]
    ]  # fmt: skip
    said = datasheet.facts(summary, steps, teacher)
    metadata = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": summary["name"],
        "description": f"{datasheet.NOT_CLINICAL} {said['what']}",
        "license": sorted({row["licence"] for row in summary["licences"]}) or ["none"],
        "version": VERSION,
        "keywords": ["medical", "visual question answering", "reasoning", "not for clinical use"],
        "inLanguage": sorted(summary["make_up"].get("language", {})),
        "distribution": files,
        "recordSet": [_record_set(split, summary["files"]) for split in summary["splits"]],
        "rai:dataCollection": said["collection"],
        "rai:dataCollectionType": ["Secondary data analysis", "Software collection"],
        "rai:dataCollectionRawData": said["sources"],
        "rai:dataCollectionMissingData": said["missing"],
        "rai:dataPreprocessingProtocol": said["preprocessing"],
        "rai:dataAnnotationProtocol": said["annotation"],
        "rai:dataAnnotationPlatform": ["none: labels and traces are made by programs"],
        "rai:dataAnnotationAnalysis": said["analysis"],
        "rai:annotationsPerItem": said["per_item"],
        "rai:annotatorDemographics": ["not known: the sources' annotators are described by the sources, if at all"],
        "rai:machineAnnotationTools": said["tools"],
        "rai:dataBiases": said["biases"],
        "rai:dataUseCases": said["uses"],
        "rai:dataLimitations": said["limits"],
        "rai:dataSocialImpact": said["impact"],
        "rai:personalSensitiveInformation": said["personal"],
        "rai:dataReleaseMaintenancePlan": said["maintenance"],
    }
    path = folder / CROISSANT
    write_json(path, metadata)
    return path


def _record_set(split: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of one split; the Parquet files of a split are joined by name."""
    from mmedexpert.curation.release import features

    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "key": {"@id": f"{split}/id"},
        "field": [field for name, kind in features().items() for field in _fields(split, name, kind)],
    }


def _fields(split: str, name: str, kind: Any) -> list[dict[str, Any]]:
    parts = {f"option_{part}": part for part in ("letter", "text")} if name == "options" else {name: ""}
    fields = []
    for part, path in parts.items():
        source: dict[str, Any] = {"fileSet": {"@id": f"{split}-files"}, "extract": {"column": name}}
        field: dict[str, Any] = {
            "@type": "cr:Field",
            "@id": f"{split}/{part}",
            "name": part,
            "source": source,
            "dataType": "sc:Text",
        }
        if name == "images":  # `repeated`, though it is no longer advised: the library reads no pictures from arrays
            field |= {"dataType": "sc:ImageObject", "repeated": True}
            path = "bytes"
        elif hasattr(kind, "feature"):
            field |= {"isArray": True, "arrayShape": "-1"}
        elif kind.dtype == "bool":
            field |= {"dataType": "sc:Boolean"}
        if path:
            source["transform"] = {"jsonPath": path}
        fields.append(field)
    return fields
