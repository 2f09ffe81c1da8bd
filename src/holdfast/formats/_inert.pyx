# cython: language_level=3
"""Inert stand-ins: what a pickle names and makes, where nothing of it is imported or run."""

cimport cython

__all__ = ["Global", "Record", "Storage", "Tensor", "brief", "shorten"]


def shorten(text, Py_ssize_t limit=60):
    """`text` from a file, fit to stand in a message: printable, and of at most `limit` characters.

    Parameters
    ----------
    text : str
    limit : int
    """
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return shown if shown.isprintable() else ascii(shown)[1:-1]


cpdef str brief(object item):
    """What an item from a pickle is, for messages: never the repr of anything unknown."""
    if type(item) is str:
        return repr(item if len(item) <= 40 else item[:37] + "...")
    if item is None or type(item) is bool:
        return repr(item)
    if type(item) is int:
        return str(item) if item.bit_length() < 128 else "an int"
    if type(item) is Global:
        return (<Global> item).path
    if type(item) is Record:
        return repr(item)
    kind = type(item).__name__
    return ("an " if kind[0] in "aeiouAEIOU" else "a ") + kind


@cython.final
cdef class Global:
    """What a pickle calls by its module and name. It is not imported.

    Attributes
    ----------
    module, name : str
    """

    def __init__(self, str module, str name):
        self.module = module
        self.name = name
        self.dtype = -1
        self.event = -1

    @property
    def path(self):
        """``module.name``, fit for a message."""
        return shorten(f"{self.module}.{self.name}", 200)

    def __reduce_ex__(self, protocol):
        raise TypeError(f"{self!r} is an inert name of something that was not loaded; it cannot be saved")

    def __repr__(self):
        return f"<global {self.path}>"


@cython.final
cdef class Record:
    """What a pickle would have made of a class or by a call, as it would have been told to.

    Nothing of a file becomes an attribute of it.

    Attributes
    ----------
    cls : object
        The class or function, a :class:`Global` as a rule.
    args : tuple
    kwargs : dict
    state : object
        What would have been set, or None.
    items : list
        What would have been appended.
    pairs : list of tuple
        Keys and values that would have been set.
    called : bool
        Whether `cls` would have been called, not made an instance of.
    offset : int
        Of the opcode, from the start of the pickle.
    """

    # Class and state stand in a tuple because Python takes long chains of those apart in bounded
    # stack.
    def __init__(self, object cls, tuple args, dict kwargs=None, *, bint called=False,
                 Py_ssize_t offset=-1):
        self._held = (cls, None)
        self.args = args
        self.kwargs = {} if kwargs is None else kwargs
        self.items = []
        self.pairs = []
        self.called = called
        self.offset = offset

    @property
    def cls(self):
        """The class or function."""
        return self._held[0]

    @property
    def state(self):
        """What would have been set, or None."""
        return self._held[1]

    def with_state(self, object state):
        """This record, told its state."""
        self._held = (self._held[0], state)
        return self

    def __reduce_ex__(self, protocol):
        raise TypeError(f"{self!r} is an inert record of an object that was not loaded; it cannot be saved")

    def __repr__(self):
        cls = self._held[0]
        text = (<Global> cls).path if type(cls) is Global else type(cls).__name__
        return f"<{'result of' if self.called else 'instance of'} {text}>"


@cython.final
cdef class Tensor:
    """Where a tensor stands in an object.

    Attributes
    ----------
    entry : int
        Of the index; -1 for one that the pickle made and gave no values.
    """

    def __init__(self, Py_ssize_t entry):
        self.entry = entry
        self.event = -1

    def __repr__(self):
        return f"<tensor {self.entry}>"


@cython.final
cdef class Ghost:
    """Stands in the memo for what a run passed over because nothing asks for it as a rule."""


@cython.final
cdef class Storage:
    """Where a storage stands in an object.

    Attributes
    ----------
    row : int
        Of ``Index.storages``.
    code : int
        Of its dtype; -1 for untyped bytes; -2 and less for the types of ``layout.QUANTIZED``.

    Parameters
    ----------
    part : tuple of int, optional
        First element and number of elements, where it is a view of a part of the row.
    """

    def __init__(self, Py_ssize_t row, int code, tuple part=None):
        self.row = row
        self.code = code
        self.event = -1
        if part is not None:
            self.first, self.numel = part

    def __repr__(self):
        return f"<storage {self.row}>"
