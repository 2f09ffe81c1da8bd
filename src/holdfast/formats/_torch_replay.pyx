# cython: language_level=3, boundscheck=False, wraparound=False
"""The second run over a pickle that torch.save wrote: the object around its tensors.

The first run has decided what each event is (:class:`Event`), so that nothing is classified
twice; whatever is no tensor, storage or container of Python's own is asked of a resolver.
"""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t

from ._inert cimport Global, Storage
from ._pickle cimport Machine
from ._torch_table cimport *

from ..errors import FormatError, UnsafeError

__all__ = ["Replay"]

# What a resolver may raise that is not about the file, or says by itself all that there is to say.
cdef tuple _AS_THEY_ARE = (UnsafeError, OSError, MemoryError, ImportError)


@cython.final
cdef class Replay(Machine):
    """Makes the object of a pickle.

    Parameters
    ----------
    data, start, name, where, base
        As for ``read_plain``.
    events, late, gives, passages
        What the first run over the same bytes noted.
    tensors : sequence
        One for each entry.
    storages : callable
        A storage by its row and code; of a view, its part too.
    resolver : Resolver
    describe : callable
        What to call the tensor or object that the opcode at an offset is about, for messages.
    given_tensors : mapping or None
        As for the first run.
    encoding : str or None
        As :class:`holdfast.layout.Structure` has it.
    """

    cdef const uint8_t[::1] events
    cdef const int64_t[::1] passages
    cdef Py_ssize_t event, entry, passage
    cdef object tensors, storages, resolver, describe
    cdef dict late, gives
    cdef object given_tensors
    cdef Storage inert

    def __init__(self, data, start, name, where, base, events, dict late, dict gives,
                 passages, tensors, storages, resolver, describe, given_tensors=None,
                 str encoding=None):
        self.events = events
        self.late = late
        self.gives = gives
        self.passages = passages
        self.tensors = tensors
        self.storages = storages
        self.resolver = resolver
        self.describe = describe
        self.given_tensors = given_tensors
        self.encoding = encoding
        self.inert = Storage(-1, -1)

    def replay(self):
        """Run the pickle; returns the object."""
        return self.run()

    cdef int next_event(self) except -1:
        if self.event >= self.events.shape[0]:
            raise self.fault("the pickle changed while it was read")
        self.event += 1
        return self.events[self.event - 1]

    cdef int on_again(self, object item) except -1:
        """Take a tensor in one step where the first run did."""
        cdef Py_ssize_t n = self.passages.shape[0]
        cdef int64_t place
        while self.passage < n and self.passages[self.passage] < self.pos:
            self.passage += 3
        if type(item) is not Global or self.passage >= n or (
                self.passages[self.passage] != self.pos):
            return 0
        if self.event + 3 > self.events.shape[0] or self.passages[self.passage + 1] > self.size:
            raise self.fault("the pickle changed while it was read")
        tensor = self.next_tensor()
        place = self.passages[self.passage + 2]
        self.pos = self.passages[self.passage + 1]
        self.passage += 3
        self.event += 3
        self.passing = True
        if place >= 0:
            self.remember(<uint64_t> place, <PyObject *> tensor)
        self.push(tensor)
        return 1

    cdef object next_tensor(self):
        self.entry += 1
        return self.tensor(self.entry - 1)

    cdef object tensor(self, Py_ssize_t entry):
        if entry >= len(self.tensors):
            raise self.fault(f"no tensor was given for entry {entry}")
        return self.tensors[entry]

    cdef object refuse(self, object error):
        """What an error of the resolver becomes here: one that says where in the file."""
        if isinstance(error, _AS_THEY_ARE):
            return error
        text = f"{self.name}: {self.describe(self.at)}: {str(error) or type(error).__name__}"
        if isinstance(error, TypeError):
            return TypeError(text)
        return FormatError(text)

    cdef object find(self, str module, str name):
        try:
            return self.resolver.find(module, name)
        except Exception as error:
            raise self.refuse(error) from error

    cdef tuple find_all(self, tuple args):
        """`args` of a call, with globals that were kept as they are found."""
        cdef Py_ssize_t i
        for i in range(len(args)):
            if type(args[i]) is Global:
                return tuple([
                    self.find((<Global> item).module, (<Global> item).name)
                    if type(item) is Global else item for item in args])
        return args

    # -- what the machine asks ---------------------------------------------------------------

    cdef object on_global(self, str module, str name):
        if module == "torch.tensor":  # what torch._tensor was called before 1.10
            module = "torch._tensor"
        if self.next_event() == KEEP:
            return Global(module, name)
        return self.find(module, name)

    cdef object on_persistent(self, object pid):
        cdef int event = self.next_event()
        if event == KEEP:
            return self.inert
        if event == CLASS:
            return pid[1 if len(pid) == 4 else 0]
        if event == GIVEN:
            return self.tensor(self.given_tensors[pid])
        if event != GIVE:
            raise self.fault("the pickle changed while it was read")
        return self.storages(*self.gives[self.event - 1])

    cdef object on_call(self, object func, tuple args):
        cdef int event = self.next_event()
        if event == NEXT:
            return self.next_tensor()
        if event == ORDERED:
            return self.make_ordered(args)
        if event == SAME:
            return args[0]
        if event == SET or event == FROZENSET:
            return self.make_set(set if event == SET else frozenset, args[0] if args else [])
        if event == NEW:
            return self.make_new(args[0], (), {})
        if event == LATE:
            return self.tensor(self.late[self.event - 1])
        if event == CALL_SKIP:
            self.next_tensor()
        elif event != CALL:
            raise self.fault("the pickle changed while it was read")
        if type(func) is Global:
            func = self.find((<Global> func).module, (<Global> func).name)
        args = self.find_all(args)
        try:
            return self.resolver.call(func, args)
        except Exception as error:
            raise self.refuse(error) from error

    cdef object make_new(self, object cls, tuple args, dict kwargs):
        if type(cls) is Global:
            cls = self.find((<Global> cls).module, (<Global> cls).name)
        try:
            return self.resolver.new(cls, args, kwargs)
        except Exception as error:
            raise self.refuse(error) from error

    cdef object on_new(self, object cls, tuple args, dict kwargs):
        cdef int event = self.next_event()
        if event == NEW:
            return self.make_new(cls, args, kwargs)
        if event == LATE:
            return self.tensor(self.late[self.event - 1])
        if event == SAME:
            return args[0]
        if event == ORDERED:
            return self.make_ordered(args)
        if event == CALL:
            return self.make_new(cls, self.find_all(args), kwargs)
        raise self.fault("the pickle changed while it was read")

    cdef object on_build(self, object target, object state):
        cdef int event = self.next_event()
        if event == ATTRIBUTES:
            self.set_attributes(target, state)
            return target
        if event == DONE:
            return target
        if event == DONE_SKIP:
            self.next_tensor()
            return target
        try:
            return self.resolver.build(target, state)
        except Exception as error:
            raise self.refuse(error) from error

    cdef int on_extend(self, object target, list items) except -1:
        try:
            self.resolver.extend(target, items)
        except Exception as error:
            raise self.refuse(error) from error
        return 0

    cdef int on_update(self, object target, list pairs) except -1:
        try:
            self.resolver.update(target, pairs)
        except Exception as error:
            raise self.refuse(error) from error
        return 0
