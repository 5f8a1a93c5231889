"""Read collections for retrieval: documents, queries, and which documents are relevant for a query.

They come in BEIR's layout (Thakur et al., 2021, arXiv:2104.08663), or are made of questions and the passages that
answer them. Every split has all documents and its own queries. A split's ``label`` lists the documents of a query as
``[number, grade]``: grade 0 is a hard negative. A document has an empty list, and is ``shared``. For a reranker the
list is that of a first stage, each with 1 as a third number if it is trained on, and ``relevant`` has the grades of all
relevant documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cache.files import expand_path
from compress.errors import UserError
from compress.maths.bm25 import rank_by_words
from compress.maths.vectors import JUDGEMENTS, judge_ranking
from compress.tasks.formats import Table, read_file
from compress.tasks.sources import choose_layout, iterate_questions, read_files

if TYPE_CHECKING:
    from compress.tasks.task import Task

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
JUDGED = {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}
"""The names of BEIR's files of judgements."""


@dataclass
class Collection:
    """Documents, and for each split its queries with ``(document, grade)`` judgements."""

    documents: list[str]
    queries: dict[str, list[tuple[str, list[tuple[int, float]]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_collection(task: Task) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Return the tables of the splits, with the columns ``text``, ``label``, ``number`` and ``shared``, and notes.

    Raises:
        UserError: the data is not there, or a judgement names a document or a query that is not.
    """
    if task.path is None:
        raise UserError(
            f"Task `{task.name}` has no data. Set task.path to a folder in BEIR's layout ({CORPUS}, {QUERIES} and "
            f"{QRELS}/test.tsv), or to questions with their passages and task.rows=questions or table."
        )
    path = expand_path(task.path)
    collection = _read_beir(task, path) if task.rows == "collection" else _read_passages(task, path)
    if not any(collection.queries.values()):
        raise UserError(f"Task `{task.name}` has no query with a relevant document. Set task.path to other data.")
    if not collection.queries.get("test") and not collection.queries.get("train"):
        raise UserError(f"Task `{task.name}` has no queries to test on. Add {QRELS}/test.tsv.")
    if task.candidates:
        tables = {split: _build_candidates(collection, split, task) for split in collection.queries}
        return tables, tuple(collection.notes)
    if train := collection.queries.get("train", []):
        collection.queries["train"] = _choose_negatives(train, collection.documents, task.embedding.negatives)
    else:
        note = "train: the documents alone, without queries; they serve calibration, distillation and vocabularies"
        collection.notes.append(note)
        collection.queries.setdefault("train", [])
    if not collection.queries["train"] and "validation" not in collection.queries:
        collection.queries["validation"] = []
    return {split: _build_table(collection, split) for split in collection.queries}, tuple(collection.notes)


def _build_table(collection: Collection, split: str) -> Table:
    queries, documents = collection.queries[split], collection.documents
    return {
        "text": [*documents, *(text for text, _ in queries)],
        "label": [*([] for _ in documents), *([[float(n), grade] for n, grade in judged] for _, judged in queries)],
        "number": [*range(len(documents)), *range(len(queries))],
        "shared": [*([True] * len(documents)), *([False] * len(queries))],
    }


def _build_candidates(collection: Collection, split: str, task: Task) -> Table:
    """Return the table of a split for a reranker: the queries with the documents that BM25 finds, and in train also
    those that are relevant."""
    queries, documents, count = collection.queries[split], collection.documents, task.candidates or 0
    found = rank_by_words([text for text, _ in queries], documents, count)
    lists, judgements = [], []
    for (_, judged), ranked in zip(queries, found.tolist()):
        grades = {number: grade for number, grade in judged if grade > 0}
        judgements.append(judge_ranking([grades.get(number, 0.0) for number in ranked], grades.values()))
        missing = [number for number in grades if number not in ranked] if split == "train" else []
        negatives = [number for number in ranked if number not in grades][: task.embedding.negatives]
        used = {*grades, *negatives}
        lists.append([[number, grades.get(number, 0.0), float(number in used)] for number in [*ranked, *missing]])
    means = dict(zip(JUDGEMENTS, [sum(column) / len(queries) for column in zip(*judgements)]))
    collection.notes.append(
        f"{split}: BM25's first {count} documents hold {means['recall_100']:.1%} of the relevant ones, and their "
        f"nDCG@10 is {means['ndcg_10']:.4f}"
    )
    table = _build_table(collection, split)
    relevant = [[grade for _, grade in judged if grade > 0] for _, judged in queries]
    return {**table, "label": [*([] for _ in documents), *lists], "relevant": [*([] for _ in documents), *relevant]}


def _choose_negatives(
    queries: list[tuple[str, list[tuple[int, float]]]], documents: list[str], count: int
) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return the queries with ``count`` hard negatives each: those that the data names, then those of BM25."""
    most = max((len(judged) for _, judged in queries), default=0)
    found = rank_by_words([text for text, _ in queries], documents, count + most) if count else None
    chosen = []
    for i, (text, judged) in enumerate(queries):
        relevant = [(number, grade) for number, grade in judged if grade > 0]
        named = [number for number, grade in judged if grade <= 0]
        mined = [] if found is None else [int(number) for number in found[i]]
        known = {number for number, _ in relevant}
        negatives = [number for number in dict.fromkeys([*named, *mined]) if number not in known]
        chosen.append((text, [*relevant, *((number, 0.0) for number in negatives[:count])]))
    return chosen


# BEIR


def _read_beir(task: Task, folder: Path) -> Collection:
    # 1) Read documents and queries
    for name in (CORPUS, QUERIES, QRELS):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} holds no {name}; {CORPUS}, {QUERIES} and {QRELS}/test.tsv are expected. Set task.path to a "
                "folder in BEIR's layout, or task.rows=questions or table for questions with passages."
            )
    documents, places = _read_texts(folder / CORPUS)
    asked, numbers = _read_texts(folder / QUERIES)
    collection = Collection(documents)
    # 2) Read the judgements of every split
    for split, names in JUDGED.items():
        files = [folder / QRELS / f"{name}.tsv" for name in names]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            continue
        judged: dict[int, list[tuple[int, float]]] = {}
        for row, (query, document, grade) in enumerate(_read_judgements(file), start=1):
            where = f"{QRELS}/{file.name}, row {row}"
            if query not in numbers:
                raise UserError(f"{where}: the query `{query}` is not in {QUERIES}. Add it there, or remove the row.")
            if document not in places:
                raise UserError(
                    f"{where}: the document `{document}` is not in {CORPUS}. Add it there, or remove the row."
                )
            judged.setdefault(numbers[query], []).append((places[document], _read_grade(grade, where)))
        kept = {query: pairs for query, pairs in judged.items() if any(grade > 0 for _, grade in pairs)}
        if left := len(judged) - len(kept):
            collection.notes.append(f"{split}: {left:,} queries without a relevant document left out")
        collection.queries[split] = [(asked[query], pairs) for query, pairs in kept.items()]
    return collection


def _read_texts(path: Path) -> tuple[list[str], dict[str, int]]:
    """Return the texts of BEIR's JSON lines, with their titles, and their places by their ids."""
    table, _ = read_file(path, None, "jsonl")
    if missing := [name for name in ("_id", "text") if name not in table]:
        raise UserError(f"{path.name} has no field `{missing[0]}`; `_id` and `text` are expected in every line.")
    titles = table.get("title", [None] * len(table["text"]))
    texts = [" ".join(filter(None, (title, text))) for title, text in zip(titles, table["text"])]
    places: dict[str, int] = {}
    for place, name in enumerate(map(str, table["_id"])):
        if name in places:
            raise UserError(f"{path.name} has the _id `{name}` twice, in line {place + 1} again. Rename one of them.")
        places[name] = place
    return texts, places


def _read_judgements(path: Path) -> list[tuple[str, str, Any]]:
    table, _ = read_file(path, None, "tsv")
    names = ("query-id", "corpus-id", "score")
    if missing := [name for name in names if name not in table]:
        raise UserError(
            f"{QRELS}/{path.name} has no column `{missing[0]}`; {', '.join(names)} are expected in its first line."
        )
    return list(zip(map(str, table[names[0]]), map(str, table[names[1]]), table[names[2]]))


def _read_grade(grade: Any, where: str) -> float:
    try:
        return float(grade)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: the score is `{str(grade)[:40]}`; a number is expected, 0 for irrelevant. Correct the row."
        ) from None


# Questions and passages


def _read_passages(task: Task, path: Path) -> Collection:
    """Return the collection of all passages, each relevant for the questions beside it."""
    folder, layout = choose_layout(task.files, path)
    missing, files = set(layout.find_missing(folder)), layout.files()
    present = {split: file for split, file in files.items() if split not in missing}
    if not present:
        expected = " and ".join(file.file for file in files.values())
        raise UserError(f"Task `{task.name}` needs {expected}, and {folder} has none. Set task.path or task.files.")
    places: dict[str, int] = {}
    collection = Collection([])
    for split, file in present.items():
        rows = read_files(folder, file, "tsv")
        collection.notes += rows.notes
        pairs = parse_questions(rows.table, file.file) if task.rows == "questions" else _select_pairs(task, rows.table)
        judged: dict[str, dict[int, float]] = {}
        for question, passage in pairs:
            judged.setdefault(question, {})[places.setdefault(passage, len(places))] = 1.0
        collection.queries[split] = [(question, list(found.items())) for question, found in judged.items()]
        if repeated := len(pairs) - len(judged):
            collection.notes.append(f"{split}: {repeated:,} questions are asked twice; each counts once")
    collection.documents = list(places)
    return collection


def parse_questions(table: Table, where: str) -> list[tuple[str, str]]:
    """Return the questions of SQuAD's records with their paragraphs.

    Raises:
        UserError: the records have another form.
    """
    try:
        return [(record["question"], context) for _, context, record in iterate_questions(table)]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where} is not in SQuAD's form (data, paragraphs, context, qas, question). Set task.rows=table for a "
            "table of questions and passages."
        ) from error


def _select_pairs(task: Task, table: Table) -> list[tuple[str, str]]:
    names = task.columns.text, task.columns.text_pair
    if missing := [name for name in names if not isinstance(name, str) or name not in table]:
        raise UserError(
            f"Task `{task.name}` has no column `{missing[0]}`; the columns are {', '.join(table)}. Set "
            "task.columns.text to the questions and task.columns.text_pair to the passages."
        )
    return [(str(question), str(passage)) for question, passage in zip(*(table[str(name)] for name in names))]
