"""The report on images with any number of labels."""

from collections import Counter
from pathlib import Path

from dualtoken_vit.data.check import report
from dualtoken_vit.data.multilabel import MultiLabelDataset, read_split
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import classification_train
from dualtoken_vit.files import counted
from dualtoken_vit.recipes import MultiLabel
from dualtoken_vit.show.drawing import draw_scene, spread


def check(recipe: MultiLabel, out: Path, augmented: bool = False) -> bool:
    """Read every image once, print a report, and draw some images as OUT/labels.png.

    Returns whether there is no problem. Problems are: unreadable images, classes without images, classes of one split
    only, images in both splits, and equal images with different labels. An InputError for data that cannot be read.
    """
    datasets = {role: read_split(recipe.data, role, recipe.model.in_chans) for role in ("train", "val")}
    facts = {role: _read(dataset, role) for role, dataset in datasets.items()}
    class_names = {role: dataset.class_names for role, dataset in datasets.items()}
    counts = {
        role: Counter(dataset.class_names[label] for labels in dataset.labels for label in labels)
        for role, dataset in datasets.items()
    }
    lines = []
    for role, dataset in datasets.items():
        none, most = sum(not labels for labels in dataset.labels), max(map(len, dataset.labels))
        mean = sum(map(len, dataset.labels)) / len(dataset)
        images = counted(len(dataset), "image")
        lines.append(f"{role}: {images}, {none} without labels; {mean:.2f} labels per image, up to {most}")
    train = datasets["train"]
    sound = spread([index for index, fact in enumerate(facts["train"]) if not fact.problem])
    if augmented:
        train.transform = report.visible(classification_train, recipe)
    samples = ((facts["train"][i].label or "no label", report.sample(train, i, recipe.run.seed)[0]) for i in sound)
    drawings = (draw_scene([(label, image, None)], ()) for label, image in samples)
    lines.append(report.contact_sheet(drawings, out / "labels.png", augmented))
    pairs = [(role, name) for role, names in class_names.items() for name in names]
    empty = [f"empty class: {role}/{name}" for role, name in pairs if not counts[role][name]]
    mixed = [f"equal images with different labels: {one}" for one in report.copies(facts, lambda _, fact: fact.label)]
    table = report.count_table(class_names, counts)
    problems = [*empty, *report.missing_classes(class_names)]
    notes = [note for dataset in datasets.values() for note in dataset.notes]
    return report.print_report(table, facts, lines, notes, problems, [mixed])


def _read(dataset: MultiLabelDataset, role: str) -> list[report.Facts]:
    """Read every image of a split, with a progress bar."""

    def look(index: int) -> report.Facts:
        label = ", ".join(dataset.class_names[label] for label in sorted(dataset.labels[index]))
        return report.read_facts(dataset.image_names[index], dataset.sources[index], label)

    return list(in_threads(look, range(len(dataset)), len(dataset), f"reading {role}"))
