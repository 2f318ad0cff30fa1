"""Mutants of a module: its source with one small change each, made by the operators of mutmut.

mutmut's own runner puts every mutant of a function behind a trampoline. Here that hides the frames and signatures that
`save_hyperparameters` and jsonargparse read, and leaves out whatever has a decorator (`torch.no_grad`, `property`) or
stands outside of functions. So only its operators are used, on the whole source.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst
from libcst import matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

OPERATORS = [(kind, operator) for kind, operator in mutation_operators if operator is not operator_string]
"""All of mutmut's but that on string literals: most are messages, and the others are keys that no test can do without."""

UNTOUCHED = (
    m.Annotation() | m.Decorator() | m.Raise() | m.Call(func=m.Name("len") | m.Name("isinstance")),
    m.Call(func=m.Attribute(value=m.Name("warnings"), attr=m.Name("warn"))),
    # Names of types: Range = tuple[float, float].
    m.Assign(value=m.Subscript(value=m.Name("Literal") | m.Name("tuple") | m.Name("dict") | m.Name("list"))),
    m.Assign(targets=[m.AssignTarget(target=m.Name("__all__"))]),
)
"""What holds no behavior to test: annotations, and the words of errors and warnings. Nothing within is changed."""


@dataclass(frozen=True)
class Mutant:
    """A changed module."""

    module: str
    """Path of the file, relative to the root of the repository."""

    function: str
    """Qualified name of the outermost function around the change, as `code.co_qualname` has it; "" outside of all."""

    line: int
    """Of the change, from 1."""

    source: str
    """Of the whole changed module."""

    removed: str
    added: str
    """Lines that differ, without the spaces at their ends, joined by newlines."""


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """All mutants of a source that Python can compile, in the order of the file, each once."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = _Finder()
    wrapper.visit(finder)
    seen = {source}
    for function, line, node, changed in finder.found:
        code = wrapper.module.deep_replace(node, changed).code
        try:
            compile(code, module, "exec")
        except SyntaxError:
            continue
        if code not in seen:
            seen.add(code)
            yield Mutant(module, function, line, code, *_difference(source, code))


def _difference(before: str, after: str) -> tuple[str, str]:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    removed, added = ("\n".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return removed, added


class _Finder(cst.CSTVisitor):
    """Collect (function, line, node, changed node)."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, cst.CSTNode, cst.CSTNode]] = []
        self._scopes: list[cst.FunctionDef | cst.ClassDef] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if any(m.matches(node, pattern) for pattern in UNTOUCHED):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._scopes.append(node)
        line = self.get_metadata(PositionProvider, node).start.line if self._has_place(node) else 0
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                self.found += [(self._function(), line, node, changed) for changed in operator(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._scopes and self._scopes[-1] is original_node:
            self._scopes.pop()

    def _has_place(self, node: cst.CSTNode) -> bool:
        return self.get_metadata(PositionProvider, node, None) is not None

    def _function(self) -> str:
        names = []
        for scope in self._scopes:
            names.append(scope.name.value)
            if isinstance(scope, cst.FunctionDef):
                return ".".join(names)
        return ""
