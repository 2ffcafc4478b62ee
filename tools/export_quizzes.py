"""Write the quizzes for a learning platform: Moodle XML, and QTI 2.1.

    python tools/export_quizzes.py [FOLDER]   # _build/quizzes unless given

    moodle.xml   Moodle: question bank, import, "Moodle XML format"
    qti.zip      Canvas and others that import "QTI 2.1" packages

The questions are those of the built notebooks, with their numbers filled in;
book/_ext/quiz.py says how they are written. Every explanation goes along as
feedback. Moodle gets an ordering as a matching of items and places, because
every Moodle has that type. Formulas are TeX between \\( and \\), which both
platforms draw with MathJax.

Sources: docs.moodle.org, "Moodle XML format"; IMS Question and Test
Interoperability 2.1, information model, sections 4 to 8.
"""

import argparse
import io
import json
import os
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from xml.etree import ElementTree as ET

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from book._ext.quiz import parse  # noqa: E402

QTI = "http://www.imsglobal.org/xsd/imsqti_v2p1"
PACKAGE = "http://www.imsglobal.org/xsd/imscp_v1p1"
LINK = re.compile(r"\]\(\.\./(?:\.\./)?([\w/]+)\.(?:md|ipynb)")


def quizzes(root):
    """Return {lesson: Quiz} of the built notebooks that have one."""
    found = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = notebook["metadata"].get("quiz")
        if text:
            where = f"book/quizzes/{path.stem}.md"
            found[path.stem] = parse(text, where)
    return found


def book_address(root):
    """Return where the book is published, with a slash at the end."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    urls = tomllib.loads(text)["project"]["urls"]
    return urls["Documentation"].rstrip("/") + "/"


class Html:
    """Turns the Markdown of a quiz into XHTML that stands alone."""

    def __init__(self, address):
        self.address = address
        self.reader = MarkdownIt("commonmark", {"xhtmlOut": True})
        self.reader.enable("table")
        self.reader.use(dollarmath_plugin, allow_labels=False)
        rules = self.reader.renderer.rules
        rules["math_inline"] = self._math("\\(", "\\)")
        rules["math_block"] = self._math("<p>\\[", "\\]</p>\n")

    @staticmethod
    def _math(begin, end):
        def render(tokens, index, options, env):
            tex = tokens[index].content.strip()
            for sign, name in (("&", "amp"), ("<", "lt"), (">", "gt")):
                tex = tex.replace(sign, f"&{name};")
            return f"{begin}{tex}{end}"

        return render

    def _absolute(self, text):
        """Lead links of book/quizzes/ to the published book."""

        def target(match):
            path = match[1]
            if not path.startswith("notebooks/"):
                path = f"book/{path}"
            return f"]({self.address}{path}.html"

        return LINK.sub(target, text)

    def block(self, text):
        """Return paragraphs as XHTML."""
        return self.reader.render(self._absolute(text)).strip()

    def line(self, text):
        """Return one paragraph's content as XHTML."""
        return self.reader.renderInline(self._absolute(text)).strip()

    def answers_in_order(self, question):
        """Return the items of an ordering with their reasons."""
        items = "".join(
            f"<li><p>{self.line(c.text)}</p>{self.block(c.why)}</li>"
            for c in question.choices
        )
        return f"<ol>{items}</ol>"


def child(parent, tag, text=None, **attributes):
    """Append an element and return it."""
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def whole(root):
    """Return a document as bytes, indented."""
    ET.indent(root, " ")
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


# ---- Moodle -----------------------------------------------------------------


def _text(parent, tag, content, **attributes):
    child(child(parent, tag, **attributes), "text", content)


def _html(parent, tag, content, **attributes):
    """Append ``tag`` with a text in HTML; return it."""
    element = child(parent, tag, format="html", **attributes)
    child(element, "text", content)
    return element


def _share(n):
    """Return one n-th of 100 as Moodle writes grades: five decimals."""
    return f"{100 / n:.5f}".rstrip("0").rstrip(".")


def _moodle_question(quiz, question, html):
    types = {"numeric": "numerical", "order": "matching"}
    type_ = types.get(question.kind, "multichoice")
    element = ET.SubElement(quiz, "question", {"type": type_})
    _text(element, "name", question.title)
    text = html.block(question.text)
    if question.unit:
        text += f"\n<p>Answer in {question.unit}.</p>"
    if question.kind == "order":
        text += "\n<p>Give each line its place, counted from 1.</p>"
    _html(element, "questiontext", text)
    reasons = question.kind == "order" and html.answers_in_order(question)
    _html(element, "generalfeedback", reasons or "")
    child(element, "defaultgrade", "1")
    child(element, "penalty", "0.3333333")
    child(element, "hidden", "0")
    if question.kind == "order":
        child(element, "shuffleanswers", "true")
        for place, choice in enumerate(question.choices, 1):
            sub = _html(element, "subquestion", html.line(choice.text))
            _text(sub, "answer", str(place))
        return
    if question.kind == "numeric":
        for choice in question.choices:
            answer = child(
                element, "answer", fraction="100" if choice.right else "0"
            )
            value = "*" if choice.value is None else repr(choice.value)
            child(answer, "text", value)
            child(answer, "tolerance", repr(choice.tolerance or 0.0))
            _html(answer, "feedback", html.block(choice.why))
        child(element, "unitgradingtype", "0")
        child(element, "showunits", "3")
        return
    single = question.kind == "single"
    child(element, "single", "true" if single else "false")
    child(element, "shuffleanswers", "true")
    child(element, "answernumbering", "abc")
    n_right = sum(choice.right for choice in question.choices)
    n_wrong = len(question.choices) - n_right
    for choice in question.choices:
        fraction = _share(n_right) if choice.right else "0"
        if not choice.right and not single:
            fraction = f"-{_share(n_wrong)}"  # else ticking all would pay
        answer = _html(
            element, "answer", html.line(choice.text), fraction=fraction
        )
        _html(answer, "feedback", html.block(choice.why))


def moodle(found, html):
    """Return all quizzes as one Moodle XML document."""
    root = ET.Element("quiz")
    for quiz in found.values():
        category = ET.SubElement(root, "question", {"type": "category"})
        title = quiz.title.replace("/", "//")  # a single one makes a subfolder
        _text(category, "category", f"$course$/LoRA from scratch/{title}")
        for question in quiz.questions:
            _moodle_question(root, question, html)
    return whole(root)


# ---- QTI 2.1 ----------------------------------------------------------------


def _xhtml(parent, tag, content, **attributes):
    """Append ``tag`` with parsed XHTML inside; return it."""
    made = ET.fromstring(f"<{tag}>{content}</{tag}>")
    made.attrib.update(attributes)
    parent.append(made)
    return made


def _value(parent, base_type, text):
    child(parent, "baseValue", text, baseType=base_type)


def _set(parent, name, base_type, text):
    _value(child(parent, "setOutcomeValue", identifier=name), base_type, text)


def _between(parent, low, high):
    both = child(parent, "and")
    for tag, bound in (("gte", low), ("lte", high)):
        comparison = child(both, tag)
        child(comparison, "variable", identifier="RESPONSE")
        _value(comparison, "float", repr(bound))


def item_name(lesson, question):
    """Return the identifier of a question in the package."""
    return f"q{lesson}-{question.slug}"


def qti_item(lesson, question, html):
    """Return one question as a QTI 2.1 assessment item."""
    ids = [chr(ord("A") + i) for i in range(len(question.choices))]
    right = [i for i, c in zip(ids, question.choices, strict=True) if c.right]
    cardinality, base_type = {
        "single": ("single", "identifier"),
        "multiple": ("multiple", "identifier"),
        "numeric": ("single", "float"),
        "order": ("ordered", "identifier"),
    }[question.kind]
    root = ET.Element(
        "assessmentItem",
        {
            "xmlns": QTI,
            "identifier": item_name(lesson, question),
            "title": question.title,
            "adaptive": "false",
            "timeDependent": "false",
        },
    )
    response = child(
        root,
        "responseDeclaration",
        identifier="RESPONSE",
        cardinality=cardinality,
        baseType=base_type,
    )
    correct = child(response, "correctResponse")
    for name in right:
        value = question.choices[ids.index(name)].value
        child(correct, "value", name if value is None else repr(value))
    score = child(
        root,
        "outcomeDeclaration",
        identifier="SCORE",
        cardinality="single",
        baseType="float",
    )
    child(child(score, "defaultValue"), "value", "0")
    child(
        root,
        "outcomeDeclaration",
        identifier="FEEDBACK",
        cardinality="multiple" if question.kind == "multiple" else "single",
        baseType="identifier",
    )
    body = child(root, "itemBody")
    _xhtml(body, "div", html.block(question.text))
    processing = ET.Element("responseProcessing")
    if question.kind == "numeric":
        label = f"Your number, in {question.unit}: " if question.unit else ""
        line = child(body, "p", label or "Your number: ")
        child(
            line,
            "textEntryInteraction",
            responseIdentifier="RESPONSE",
            expectedLength="12",
        )
        condition = child(processing, "responseCondition")
        pairs = sorted(
            zip(ids, question.choices, strict=True),
            key=lambda p: not p[1].right,
        )  # the right number is asked for first
        for name, choice in pairs:
            if choice.value is None:
                branch = child(condition, "responseElse")
            else:
                tag = "responseIf" if choice.right else "responseElseIf"
                branch = child(condition, tag)
                near = choice.tolerance
                _between(branch, choice.value - near, choice.value + near)
            if choice.right:
                _set(branch, "SCORE", "float", "1")
            _set(branch, "FEEDBACK", "identifier", name)
    else:
        order = question.kind == "order"
        more = {} if order else {"maxChoices": "1"}
        if question.kind == "multiple":
            more = {"maxChoices": "0"}  # as many as the reader likes
        interaction = child(
            body,
            "orderInteraction" if order else "choiceInteraction",
            responseIdentifier="RESPONSE",
            shuffle="true",
            **more,
        )
        for name, choice in zip(ids, question.choices, strict=True):
            _xhtml(
                interaction,
                "simpleChoice",
                html.line(choice.text),
                identifier=name,
            )
        branch = child(child(processing, "responseCondition"), "responseIf")
        same = child(branch, "match")
        child(same, "variable", identifier="RESPONSE")
        child(same, "correct", identifier="RESPONSE")
        _set(branch, "SCORE", "float", "1")
        if order:
            _set(processing, "FEEDBACK", "identifier", "ALL")
        else:
            shown = child(processing, "setOutcomeValue", identifier="FEEDBACK")
            child(shown, "variable", identifier="RESPONSE")
    root.append(processing)
    said = zip(ids, (html.block(c.why) for c in question.choices), strict=True)
    if question.kind == "order":
        said = [("ALL", html.answers_in_order(question))]
    for name, why in said:
        _xhtml(
            root,
            "modalFeedback",
            why,
            outcomeIdentifier="FEEDBACK",
            identifier=name,
            showHide="show",
        )
    return whole(root)


def qti_test(found):
    """Return the test that names all items, one section for each lesson."""
    root = ET.Element(
        "assessmentTest",
        {
            "xmlns": QTI,
            "identifier": "lora-from-scratch",
            "title": "LoRA from scratch",
        },
    )
    part = child(
        root,
        "testPart",
        identifier="all",
        navigationMode="nonlinear",
        submissionMode="individual",
    )
    for lesson, quiz in found.items():
        section = child(
            part,
            "assessmentSection",
            identifier=f"s{lesson}",
            title=quiz.title,
            visible="true",
        )
        for question in quiz.questions:
            name = item_name(lesson, question)
            child(
                section,
                "assessmentItemRef",
                identifier=name,
                href=f"items/{name}.xml",
            )
    return whole(root)


def qti_manifest(found):
    """Return the list of contents that a package must have."""
    root = ET.Element(
        "manifest", {"xmlns": PACKAGE, "identifier": "lora-from-scratch-quiz"}
    )
    metadata = child(root, "metadata")
    child(metadata, "schema", "QTIv2.1 Package")
    child(metadata, "schemaversion", "1.0.0")
    child(root, "organizations")
    resources = child(root, "resources")

    def resource(name, type_, path):
        element = child(
            resources, "resource", identifier=name, type=type_, href=path
        )
        child(element, "file", href=path)
        return element

    test = resource("test", "imsqti_test_xmlv2p1", "test.xml")
    for lesson, quiz in found.items():
        for question in quiz.questions:
            name = item_name(lesson, question)
            path = f"items/{name}.xml"
            resource(name, "imsqti_item_xmlv2p1", path)
            child(test, "dependency", identifierref=name)
    return whole(root)


def qti(found, html):
    """Return all quizzes as one QTI package, the same bytes every time."""
    files = {
        "imsmanifest.xml": qti_manifest(found),
        "test.xml": qti_test(found),
    }
    for lesson, quiz in found.items():
        for question in quiz.questions:
            name = f"items/{item_name(lesson, question)}.xml"
            files[name] = qti_item(lesson, question, html)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, content)
    return buffer.getvalue()


def write(path, content):
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def main(arguments=None, root=ROOT):
    """Write both files and say how many questions they hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = root / "_build" / "quizzes"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args(arguments).folder
    found = quizzes(root)
    if not found:
        sys.exit(
            f"no notebook in {root / 'notebooks'} holds a quiz; "
            "run `make notebooks`"
        )
    html = Html(book_address(root))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "moodle.xml", moodle(found, html))
    write(folder / "qti.zip", qti(found, html))
    n = sum(len(quiz.questions) for quiz in found.values())
    print(f"{n} questions of {len(found)} lessons -> {folder}")


if __name__ == "__main__":
    main()
