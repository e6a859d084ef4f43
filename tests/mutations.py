"""Every small wrong change of a Python file, as a change of its text: `mutate.py` runs them.

`ast` tells where each operator, constant, call or statement stands, and only that piece of the text
changes; lines keep their numbers. Left out is what no reader would call behaviour: docstrings, all
strings (f-strings whole), type annotations, imports, `if __name__` blocks, what is raised, printed
or shown as help, the messages of asserts, the colours and sizes of a picture's parts, and on which
device a tensor is made.
"""

import ast
import re
from dataclasses import dataclass

COMPARE = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
           ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
           ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in")}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
              ast.FloorDiv: ("//", "*"), ast.Pow: ("**", "*")}
RENAMED = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "amax": "amin",
           "amin": "amax", "argmax": "argmin", "argmin": "argmax", "sum": "mean", "mean": "sum"}
MESSAGES = ("print", "UserError", "ValueError", "refuse")  # calls that speak to people
HELP = ("help", "description", "desc", "metavar", "epilog", "usage", "prog")
LOOKS = ("color", "alpha", "figsize", "dpi", "fontsize", "linewidth", "linestyle", "marker",
         "markersize", "width", "rotation", "ha", "va", "textcoords", "xytext", "frameon", "aspect",
         "cmap", "vmin", "vmax")  # of a picture
PLACES = ("device", "map_location")  # dropped, they change nothing on a machine with one device
KEPT = ("dataclass", "property", "staticmethod", "classmethod")  # without these nothing would run


@dataclass(frozen=True)
class Mutant:
    """A change of one piece of a file; before and after are the lines around it, for people."""

    file: str
    function: str  # "" outside of functions; a method is Class.name
    line: int
    lines: tuple  # the lines of its statement, of which a test must execute one
    names: tuple  # names that the statement defines while its module is imported, else ()
    start: int  # the piece of the text, in characters
    end: int
    new: str
    before: str
    after: str

    def apply(self, text):
        return text[: self.start] + self.new + text[self.end :]

    def __str__(self):
        return f"{self.file}:{self.line} {self.function}\n    - {self.before}\n    + {self.after}"


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, file, text):
        self.file, self.text, self.found = file, text, {}
        self.scope, self.statement = [], None
        self.line_starts = [0]
        for line in text.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.lines = text.splitlines()
        for node in ast.parse(text).body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            self.top = self.line_starts[first - 1], self.end(node)
            self.visit(node)

    # ---- places

    def at(self, line, column):
        """The place in the text of ast's line and column, which counts bytes."""
        return self.line_starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def start(self, node):
        return self.at(node.lineno, node.col_offset)

    def end(self, node):
        return self.at(node.end_lineno, node.end_col_offset)

    def source(self, node):
        return self.text[self.start(node) : self.end(node)]

    def add(self, start, end, new):
        """Note the mutant that replaces this piece of the text, unless it is there or nonsense."""
        new += "\n" * (self.text.count("\n", start, end) - new.count("\n"))
        wrong = self.text[:start] + new + self.text[end:]
        try:
            ast.parse(self.text[self.top[0] : start] + new + self.text[end : self.top[1]])
        except SyntaxError:
            return
        if wrong in self.found:
            return
        first = self.text.rfind("\n", 0, start) + 1
        last = self.text.find("\n", end)
        before, after = (" ".join(piece.split()) for piece in (
            self.text[first:last], self.text[first:start] + new + self.text[end:last]))
        lines, names = self.where()
        self.found[wrong] = Mutant(self.file, ".".join(name for name, _ in self.scope),
                                   self.text.count("\n", 0, start) + 1, lines, names, start, end,
                                   new, before, after)

    def where(self):
        """(lines, names): where the statement is executed, and what it defines at import."""
        node = self.statement
        body = getattr(node, "body", None)
        lines = range(node.lineno, (body[0].lineno if body else node.end_lineno + 1))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):  # a decorator, a default
            lines = range(body[0].lineno, node.end_lineno + 1)
            return tuple(lines), () if isinstance(node, ast.FunctionDef) else (node.name,)
        if any(isinstance(scope, ast.FunctionDef) for _, scope in self.scope):
            return tuple(lines), ()
        return tuple(lines), tuple(sorted(stored(node))) or ("*",)

    def swap(self, left, right, pattern, new):
        """Replace the operator between two nodes."""
        gap = self.text[self.end(left) : self.start(right)]
        bare = re.sub(r"#.*", lambda comment: " " * len(comment[0]), gap)
        found = re.search(rf"\b{pattern}\b" if pattern[0].isalpha() else re.escape(pattern), bare)
        self.add(self.end(left) + found.start(), self.end(left) + found.end(), new)

    # ---- what is visited

    def visit(self, node):
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node
        super().visit(node)
        self.statement = outer

    def visit_nothing(self, node):
        pass

    visit_Import = visit_ImportFrom = visit_Raise = visit_JoinedStr = visit_nothing

    def visit_FunctionDef(self, node):
        for decorator in node.decorator_list:
            if not self.source(decorator).startswith(KEPT):
                self.add(self.start(decorator) - 1, self.end(decorator), "")
        for default in node.args.defaults + node.args.kw_defaults:
            if default:
                self.visit(default)
        self.scope.append((node.name, node))
        for child in node.body:
            self.visit(child)
        self.scope.pop()

    def visit_ClassDef(self, node):
        self.scope.append((node.name, node))
        for child in node.body:
            self.visit(child)
        self.scope.pop()

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Assert(self, node):
        self.visit(node.test)

    # ---- the mutations

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:]):
            self.swap(left, right, *COMPARE[type(op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            self.swap(left, right, old, new)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        # A difference of strings is an error wherever it runs, and shows nothing about the tests.
        text = any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", 0), str)
                   for part in ast.walk(node))
        if type(node.op) in ARITHMETIC and not (isinstance(node.op, ast.Add) and text):
            self.swap(node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        word = {ast.Not: r"not\b\s*", ast.USub: "-"}.get(type(node.op))
        if word:
            start = self.start(node)
            self.add(start, start + re.match(word, self.text[start:]).end(), "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.add(self.start(node), self.end(node), str(not value))
        elif isinstance(value, int):
            self.add(self.start(node), self.end(node), str(value + 1))
        elif isinstance(value, float):
            self.add(self.start(node), self.end(node), repr(2 * value or 1.0))

    def visit_Slice(self, node):
        for bound in (node.lower, node.upper, node.step):
            if bound and not isinstance(bound, (ast.Constant, ast.UnaryOp)):
                self.add(self.start(bound), self.end(bound), f"({self.source(bound)}) + 1")
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if isinstance(node.slice, ast.BinOp):
            self.add(self.end(node.slice), self.end(node.slice), " + 1")
        self.generic_visit(node)

    def visit_Call(self, node):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
            node.func, "id", "")
        if name in MESSAGES:
            return
        if name == "detach":
            self.add(self.end(node.func.value), self.end(node), "")
        if name in RENAMED and (isinstance(node.func, ast.Attribute) or name in ("max", "min")):
            self.add(self.end(node.func) - len(name), self.end(node.func), RENAMED[name])
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in HELP + LOOKS + PLACES:
                self.drop(node, keyword)
        for child in [node.func, *node.args]:
            self.visit(child)
        for keyword in node.keywords:
            if keyword.arg not in HELP + LOOKS:
                self.visit(keyword.value)

    def drop(self, call, keyword):
        """Without this argument; the comma before it goes too, or else the one after it."""
        others = sorted([*call.args, *call.keywords], key=self.start)
        i = others.index(keyword)
        if i > 0:
            start = self.end(others[i - 1])
            # Closing brackets around the argument before stay.
            start += re.match(r"[\s)]*(?=,)", self.text[start : self.start(keyword)]).end()
            self.add(start, self.end(keyword), "")
        else:
            after = self.start(others[1]) if len(others) > 1 else self.end(keyword)
            self.add(self.start(keyword), after, "")

    def negate(self, test):
        """A comparison and a `not` are turned by their own mutations."""
        turned = isinstance(test, ast.Compare) and len(test.ops) == 1 and not isinstance(
            test.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
        if not turned and not isinstance(test, (ast.Constant, ast.UnaryOp)):
            self.add(self.start(test), self.end(test), f"(not ({self.source(test)}))")

    def visit_If(self, node):
        if "__name__" in self.source(node.test):
            return
        self.negate(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_If

    def visit_comprehension(self, node):
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_With(self, node):
        if all(item.optional_vars is None for item in node.items):  # no_grad, autocast
            self.add(self.start(node), self.end(node.items[-1].context_expr), "if True")
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") not in MESSAGES:
            self.add(self.start(node), self.end(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        if type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            self.swap(node.target, node.value, old + "=", new + "=")
        self.add(self.start(node), self.end(node), "pass")
        self.generic_visit(node)


def mutants_of(file, text):
    """All mutants of a file's text, in their order."""
    return sorted(Finder(file, text).found.values(), key=lambda mutant: (mutant.start, mutant.end))


def lines_in_functions(text):
    """The numbers of all lines in bodies of functions."""
    return {line for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            for line in range(node.body[0].lineno, node.end_lineno + 1)}


def stored(node):
    """The names that a statement defines; the variables of a comprehension are nobody else's."""
    parts = getattr(node, "targets", [getattr(node, "target", node)])
    return {n.id for part in parts for n in ast.walk(part)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def definitions(text):
    """[(names, words)] of a file's statements outside of functions: what they define, with what."""
    tree = ast.parse(text)
    bodies = [tree.body] + [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    return [(stored(node), set(re.findall(r"\w+", ast.unparse(node)))) for body in bodies
            for node in body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
