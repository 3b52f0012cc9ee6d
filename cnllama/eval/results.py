# SPDX-License-Identifier: Apache-2.0
"""Answers counted by subject and group, compared with a second model's, and written as tables and files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cnllama.errors import printable
from cnllama.eval.answers import Answer
from cnllama.eval.benchmarks import Benchmark
from cnllama.eval.numerics import sign_test


def count(answers: Sequence[Answer]) -> dict[str, Any]:
    """Questions, unanswered ones, and where the answers are known how many are right.

    accuracy: right answers over all questions; subject_mean: the mean of the subjects' accuracies.
    """
    known = [answer.correct for answer in answers if answer.correct is not None]
    result: dict[str, Any] = {
        "questions": len(answers),
        "unanswered": sum(answer.drawn or answer.letter is None for answer in answers),
    }
    if known:
        subjects: dict[str, list[bool]] = {}
        for answer in answers:
            if answer.correct is not None:
                subjects.setdefault(answer.prompt.subject.key, []).append(answer.correct)
        mean = statistics.fmean(sum(right) / len(right) for right in subjects.values())
        result |= {"correct": sum(known), "accuracy": sum(known) / len(known), "subject_mean": mean}
    return result


def summarize(benchmark: Benchmark, answers: Sequence[Answer], one_group: bool = False) -> dict[str, Any]:
    """Counts over all, by group and by subject, in the benchmark's order. one_group: a subject counts for the first of
    its groups only, as the published scripts count.
    """
    by_subject: dict[str, list[Answer]] = {}
    by_group: dict[str, list[Answer]] = {}
    for answer in answers:
        by_subject.setdefault(answer.prompt.subject.key, []).append(answer)
        groups = answer.prompt.subject.groups
        for group in groups[:1] if one_group else groups:
            by_group.setdefault(group, []).append(answer)
    order = [group for info in benchmark.subjects.values() for group in info.groups]
    return {
        **count(answers),
        "drawn": sum(answer.drawn for answer in answers),
        "groups": {group: count(by_group[group]) for group in dict.fromkeys(order) if group in by_group},
        "subjects": {key: count(by_subject[key]) for key in benchmark.subjects if key in by_subject},
    }


def compare_choices(ours: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, Any]:
    """The same questions answered by two models, with the paired test of the difference where answers are known."""
    pairs = list(zip(ours, reference, strict=True))
    result: dict[str, Any] = count(reference) | {
        "same_choice": sum(a.letter == b.letter for a, b in pairs) / len(pairs),
    }
    known = [(bool(a.correct), bool(b.correct)) for a, b in pairs if a.correct is not None]
    if known:
        only_ours = sum(a and not b for a, b in known)
        only_reference = sum(b and not a for a, b in known)
        result |= {
            "difference": (only_ours - only_reference) / len(known),
            "only_ours_right": only_ours,
            "only_reference_right": only_reference,
            "p_value": sign_test(only_ours, only_reference),
        }
    return result


def submission(answers: Sequence[Answer]) -> dict[str, dict[str, str]]:
    """{subject: {id: letter}} as C-Eval takes it; an unanswered question has an empty letter."""
    result: dict[str, dict[str, str]] = {}
    for answer in answers:
        result.setdefault(answer.prompt.subject.key, {})[answer.prompt.question.id] = answer.letter or ""
    return result


def table(result: dict[str, Any]) -> str:
    """The accuracy table in Markdown: subjects, groups, all; the accuracy of several is what the procedure averages."""
    key = "subject_mean" if result["procedure"]["mean_of"] == "subjects" else "accuracy"
    lines = ["| subject | questions | correct | accuracy |", "|---|---:|---:|---:|"]
    lines += [_line(name, counts, "accuracy") for name, counts in result["subjects"].items()]
    lines += [_line(f"**{group}**", counts, key) for group, counts in result["groups"].items()]
    return "\n".join([*lines, _line("**all**", result, key)])


def _line(name: str, counts: dict[str, Any], key: str) -> str:
    name = printable(name)  # of a file
    if key not in counts:
        return f"| {name} | {counts['questions']} | | |"
    return f"| {name} | {counts['questions']} | {counts['correct']} | {counts[key]:.1%} |"


def sentences(result: dict[str, Any]) -> list[str]:
    """What the table does not say, one sentence each."""
    lines = []
    if "accuracy" in result:
        lines.append(
            f"accuracy {result['accuracy']:.2%}: {result['correct']} of {result['questions']} questions; mean of the "
            f"subjects {result['subject_mean']:.2%}; preset {result['preset']}, {result['shots']} shots"
        )
    procedure = result["procedure"]
    source = f"as {procedure['source']}, but " if procedure["source"] else ""
    lines.append(source + "; ".join(procedure["differences"]))
    if result["unanswered"]:
        drawn = "were drawn at random, as the scripts do" if result["drawn"] else "count as wrong"
        lines.append(f"{result['unanswered']} answers held no letter and {drawn}")
    reference = result.get("reference")
    if reference:
        lines.append(f"the reference makes the same choice in {reference['same_choice']:.2%} of the questions")
    if reference and "accuracy" in reference:
        lines.append(
            f"reference accuracy {reference['accuracy']:.2%}, difference {reference['difference']:+.2%}: only ours "
            f"right {reference['only_ours_right']}, only the reference right {reference['only_reference_right']}, "
            f"p = {reference['p_value']:.3g} (exact McNemar test)"
        )
    return lines
