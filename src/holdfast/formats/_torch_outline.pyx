# cython: language_level=3, boundscheck=False, wraparound=False
"""The first run over a pickle that torch.save wrote: where its tensors are.

Tensors become rows, storages too; all other classes, calls and their results inert records.
"""

from collections import OrderedDict

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint16_t, uint64_t

from ._inert cimport Ghost, Global, Record, Storage, Tensor, brief
from ._torch_table cimport *
from ._torch_usual cimport Usual

import numpy as np

from ._torch_names import DTYPES_BY_NAME, LEGACY_TENSORS, REBUILD, STORAGE_TYPES

__all__ = ["Outline"]

cdef enum:
    # Roles of a Tensor.
    FRESH = 0     # nothing else refers to it
    SHARED = 1
    WRAPPED = 2   # only a parameter refers to it
    WRAPPER = 3
    PENDING = 4   # its state is still to come
    PENDING_PARAMETER = 5
    PENDING_VARIABLE = 6

cdef dict _CODES = {
    ("torch._utils", "_rebuild_tensor"): REBUILD_V1,
    ("torch._utils", "_rebuild_tensor_v2"): REBUILD_V2,
    ("torch._utils", "_rebuild_tensor_v3"): REBUILD_V3,
    ("torch._utils", "_rebuild_parameter"): PARAMETER_OF,
    ("torch._tensor", "_rebuild_from_type_v2"): FROM_TYPE,
    ("torch.autograd.variable", "Variable"): VARIABLE,
    ("torch.nn.parameter", "Parameter"): PARAMETER,
    ("torch._tensor", "Tensor"): LEGACY,
    ("collections", "OrderedDict"): DICT,
    ("builtins", "set"): SET_TYPE,
    ("builtins", "frozenset"): FROZENSET_TYPE,
    ("copyreg", "_reconstructor"): RECONSTRUCT,
    **{key: SPECIAL for key in REBUILD},
    **{(module, name): LEGACY for name in LEGACY_TENSORS for module in ("torch", "torch.cuda")},
}

cdef void _classify(Global g):
    """Say what a global is to torch's pickles."""
    g.code = _CODES.get((g.module, g.name), UNKNOWN)
    if g.module == "torch" or g.module.startswith("torch."):
        if g.name.endswith("Storage") and g.name in STORAGE_TYPES:
            g.code = STORAGE_TYPE
            g.dtype = STORAGE_TYPES[g.name]
        elif g.module == "torch" and g.name in DTYPES_BY_NAME:
            g.dtype = DTYPES_BY_NAME[g.name]


@cython.final
cdef class Outline(Table):
    """Runs a pickle inertly and collects its tensors.

    Parameters
    ----------
    data, start, name, where, base
        As for ``read_plain``.
    legacy : bool
        Whether persistent ids are those of the legacy stream.
    tensors, storages : mapping or None
        What a persistent id that is an integer names: an entry, or a row and a code, and for a
        view first element and number of elements.
    quick : bool
        Whether to take tensors in one step that are written as nearly all are. PassedOver where
        the pickle then asks for something that was in one of these.
    """

    cdef object given_tensors, given_storages
    cdef dict given, plain
    cdef readonly dict late, globals
    cdef list known, kept
    cdef bint quick
    cdef Usual usual_
    cdef Ghost ghost
    cdef Columns passages

    def __init__(self, data, start, name, where, base, bint legacy=False, tensors=None,
                 storages=None, bint quick=True):
        Table.__init__(self, data, start, name, where, base, legacy)
        self.given_tensors = tensors
        self.given_storages = storages
        self.known, self.kept = [], []
        self.quick = quick and tensors is None
        self.usual_, self.ghost, self.passages = Usual(), Ghost(), Columns()
        self.given, self.late, self.plain, self.globals = {}, {}, {}, {}

    def outline(self):
        """Run the pickle; returns the object. Where it ends is then ``end``."""
        root = self.run()
        for g in self.known:
            if (<Global> g).used >= (<Global> g).pushed:
                self.events.data[(<Global> g).event] = KEEP
        for storage in self.kept:
            wanted = (<Storage> storage).used < (<Storage> storage).pushed
            self.events.data[(<Storage> storage).event] = GIVE if wanted else KEEP
        return root

    @property
    def end(self):
        return self.pos

    def gives(self):
        """Row and code of the storages that the second run gives away, by event; of views, part."""
        cdef Mention *found = <Mention *> self.mentions.data
        cdef size_t i
        made = {}
        for i in range(self.mentions.nbytes // sizeof(Mention)):
            if self.events.data[found[i].event] != GIVE:
                continue
            given = (found[i].row, found[i].code)
            if found[i].narrowed:
                given += ((found[i].first, found[i].numel),)
            made[found[i].event] = given
        return made

    def passages_array(self):
        """The tensors that were taken in one step, for the second run to do so as well."""
        return self.passages.array(np.dtype(np.int64))

    def event_bytes(self):
        """What the second run has to do, one byte each."""
        return self.events.array(np.dtype(np.uint8)).tobytes()

    # -- globals and persistent ids ----------------------------------------------------------

    cdef object on_global(self, str module, str name):
        cdef Global g
        if module == "torch.tensor":  # what torch._tensor was called before 1.10
            module = "torch._tensor"
        g = Global(module, name)
        _classify(g)
        g.event = self.event(FIND)
        if g.code:
            g.pushed = 1
            self.known.append(g)
        if not (g.code and g.code <= STORAGE_TYPE) and g.dtype < 0:
            self.globals.setdefault(f"{module}.{name}", None)
        return g

    cdef int on_again(self, object item) except -1:
        cdef Tensor tensor
        if type(item) is Global:
            if (<Global> item).code == REBUILD_V2 and self.quick and self.pass_over():
                return 1
            (<Global> item).pushed += 1
        elif type(item) is Storage:
            if (<Storage> item).pushed == 1:
                self.kept.append(item)
            (<Storage> item).pushed += 1
        else:
            tensor = <Tensor> item
            if tensor.role == FRESH:
                tensor.role = SHARED
            elif tensor.role == WRAPPED:  # what the parameter wraps is wanted by itself as well
                tensor.role = SHARED
                self.events.data[tensor.event] = CALL
                self.set_kind(tensor.entry, self.plain.pop(tensor.entry))
        return 0

    cdef int pass_over(self) except -1:
        """Take the tensor that begins here in one step, if it is written as nearly all are."""
        cdef Usual usual = self.usual_
        cdef Ghost ghost
        cdef Passage passage
        cdef int64_t row
        cdef int i
        if not usual.parse(self.data, self.pos, self.size, self.memo, self.memo_room, self.legacy):
            return 0
        row = self.find_storage(usual.key, usual.dtype, usual.numel, usual.location)
        made = Tensor(self.put_row(row, usual.dtype, 0, usual.numel, usual.dtype, usual.offset,
                                   usual.ndim, usual.dims, usual.steps))
        (<uint16_t *> self.flags.add(sizeof(uint16_t)))[0] = 0
        passage.start = self.pos - self.begin
        self.pos = usual.pos
        self.passing = True
        for i in range(usual.nghosts):
            self.remember(<uint64_t> usual.ghosts[i], <PyObject *> self.ghost)
        if usual.new_key and usual.key_place >= 0:
            ghost = Ghost()
            ghost.key = usual.key
            self.remember(<uint64_t> usual.key_place, <PyObject *> ghost)
        if usual.result >= 0:
            self.remember(<uint64_t> usual.result, <PyObject *> made)
        passage.end = self.pos - self.begin
        passage.place = usual.result
        (<Passage *> self.passages.add(sizeof(Passage)))[0] = passage
        self.event(KEEP)
        self.event(ORDERED)
        self.event(NEXT)
        self.push(made)
        return 1

    cdef object on_persistent(self, object pid):
        cdef tuple parts
        if type(pid) is int and (self.given_tensors is not None or self.given_storages is not None):
            return self.on_given(pid)
        if type(pid) is not tuple:
            raise self.fault(f"a persistent id that is {brief(pid)}, expected a tuple")
        parts = <tuple> pid
        if (self.legacy and len(parts) == 4 and parts[0] == "module") or (
                self.given_tensors is not None and len(parts) == 3):
            # The class of a module, with its source: of no use without running it.
            self.event(CLASS)
            return parts[1 if len(parts) == 4 else 0]
        if self.given_tensors is not None or len(parts) != (6 if self.legacy else 5) or (
                type(parts[0]) is not str or parts[0] != "storage"):
            raise self.fault(
                f"a persistent id of {len(parts)} items that is not one of a storage")
        return self.on_storage(parts)

    cdef object on_given(self, object pid):
        cdef Storage storage
        if self.given_tensors is not None and pid in self.given_tensors:
            self.event(GIVEN)
            if pid in self.given:
                self.on_again(self.given[pid])
            else:
                self.given[pid] = Tensor(self.given_tensors[pid])
            return self.given[pid]
        if self.given_storages is not None and pid in self.given_storages:
            given = self.given_storages[pid]
            storage = Storage(*given)
            storage.pushed = 1
            storage.event = self.event(GIVE)
            self.mention(storage, storage.event, len(given) == 3)
            return storage
        raise self.fault(f"a persistent id {brief(pid)} that names nothing")

    # -- calls -------------------------------------------------------------------------------

    cdef int set_kind(self, Py_ssize_t entry, object kind) except -1:
        if kind is None:
            self.kinds.pop(entry, None)
        else:
            self.kinds[entry] = kind
        return 0

    cdef object on_call(self, object func, tuple args):
        cdef Global g
        cdef int code
        if type(func) is not Global:
            if type(func) is not Record:
                raise self.fault(f"a call of {brief(func)}")
            return self.ask(func, args)
        g = <Global> func
        code = g.code
        if code == UNKNOWN:
            return self.ask(func, args)
        g.used += 1
        if code <= REBUILD_V3:
            return self.rebuild(g, args)
        if code == DICT:
            self.event(ORDERED)
            return self.make_ordered(args)
        if code == SET_TYPE or code == FROZENSET_TYPE:
            kind = set if code == SET_TYPE else frozenset
            self.event(SET if code == SET_TYPE else FROZENSET)
            if len(args) > 1:
                raise self.fault(f"a set of {len(args)} arguments")
            return self.make_set(kind, args[0] if args else [])
        if code == PARAMETER_OF or code == VARIABLE or code == PARAMETER:
            return self.wrap(g, args)
        if code == FROM_TYPE:
            return self.from_type(g, args)
        if code == LEGACY and not args:
            return self.pending(CALL, PENDING)
        if code == RECONSTRUCT and len(args) == 3 and type(args[1]) is Global and (
                (<Global> args[1]).module == "builtins" and (<Global> args[1]).name == "object"):
            self.event(NEW)
            return Record(args[0], (), offset=self.at - self.begin)
        return self.ask(func, args)

    cdef object pending(self, int event, int role):
        """A tensor whose state is still to come; if none comes, the second run asks for it."""
        made = Tensor(-1)
        made.role = role
        made.event = self.event(event)
        return made

    cdef Tensor add_tensor(self, tuple args, int code):
        if self.given_tensors is not None:
            raise self.fault("makes a tensor, where all have their place in a table")
        return Table.add_tensor(self, args, code)

    cdef object ask(self, object func, tuple args, int event=CALL):
        """A call that is nothing to this run."""
        self.event(event)
        for item in args:
            if type(item) is Global and (<Global> item).code:
                (<Global> item).used += 1  # the second run finds these when it makes the call
        return Record(func, args, called=True, offset=self.at - self.begin)

    cdef object rebuild(self, Global func, tuple args):
        made = self.add_tensor(args, func.code)
        if made is None:
            return self.ask(func, args)
        if self.usual(args, func.code):
            (<Storage> args[0]).used += 1
            if (<Storage> args[0]).pushed == 1:
                self.events.data[(<Storage> args[0]).event] = KEEP
            self.event(NEXT)
        else:
            self.ask(func, args, CALL_SKIP)
        return made

    cdef object wrap(self, Global func, tuple args):
        """A parameter or Variable around a tensor: the tensor itself, of another kind."""
        cdef Tensor inner, made
        cdef Py_ssize_t n = len(args)
        if n == 0 or type(args[0]) is not Tensor or (<Tensor> args[0]).role != FRESH or n > 3 or (
                n == 3 and (type(args[2]) not in (OrderedDict, dict, type(None)) or args[2])) or (
                n > 1 and type(args[1]) is not bool) or (<Tensor> args[0]).entry < 0:
            return self.ask(func, args)
        inner = <Tensor> args[0]
        inner.role = WRAPPED
        inner.event = self.event(SAME)
        self.plain[inner.entry] = self.kinds.get(inner.entry)
        self.set_gradient(func.code, inner.entry, n < 2 or args[1] is True)
        made = Tensor(inner.entry)
        made.role = WRAPPER
        made.event = func.code
        return made

    cdef int set_gradient(self, int code, Py_ssize_t entry, bint wanted) except -1:
        if wanted and code != VARIABLE and entry < self.nentries:
            self.check_gradient((<Row *> self.rows.data + entry).dtype)
        if code == VARIABLE:
            return self.set_kind(entry, "requires_grad" if wanted else None)
        return self.set_kind(entry, "parameter" if wanted else "parameter,frozen")

    cdef object from_type(self, Global func, tuple args):
        """A tensor of a subclass, or with attributes: shown as a plain one, asked for as it is."""
        cdef object inner = None
        if len(args) != 4 or type(args[2]) is not tuple:
            raise self.fault(f"a tensor of a subclass, made of {len(args)} arguments")
        if type(args[0]) is Global and 0 < (<Global> args[0]).code <= REBUILD_V3:
            inner = self.add_tensor(<tuple> args[2], (<Global> args[0]).code)
        if inner is None:
            return self.ask(func, args)
        self.ask(func, args, CALL_SKIP)
        return Record(func, (args[0], args[1], inner, args[3]), called=True,
                      offset=self.at - self.begin)

    # -- instances and states ----------------------------------------------------------------

    cdef object on_new(self, object cls, tuple args, dict kwargs):
        cdef int code = (<Global> cls).code if type(cls) is Global else UNKNOWN
        if type(cls) is not Global and type(cls) is not Record:
            raise self.fault(f"an instance of {brief(cls)}")
        if code == DICT and not kwargs:
            (<Global> cls).used += 1
            self.event(ORDERED)
            return self.make_ordered(args)
        if (code == PARAMETER or code == VARIABLE) and args and not kwargs:
            (<Global> cls).used += 1
            return self.wrap(<Global> cls, args)
        if code in (PARAMETER, VARIABLE, LEGACY) and not args and not kwargs:
            (<Global> cls).used += 1
            if code == LEGACY:
                return self.pending(NEW, PENDING)
            return self.pending(NEW, PENDING_PARAMETER if code == PARAMETER else PENDING_VARIABLE)
        self.event(NEW)
        if code:
            (<Global> cls).used += 1
        return Record(cls, args, kwargs, offset=self.at - self.begin)

    cdef object on_build(self, object target, object state):
        if type(target) is Record:
            self.event(STATE)
            return (<Record> target).with_state(state)
        if type(target) is OrderedDict:
            self.event(ATTRIBUTES)
            self.set_attributes(target, state)
            return target
        if type(target) is Tensor:
            return self.build_tensor(<Tensor> target, state)
        raise self.fault(f"a state for {brief(target)}")

    cdef object build_tensor(self, Tensor target, object state):
        """The states of tensors, Variables and Parameters before 0.4."""
        cdef Tensor inner
        cdef tuple items = state if type(state) is tuple else None
        cdef Py_ssize_t n = len(items) if items is not None else -1
        if target.role == PENDING and n == 4:
            inner = self.add_tensor(items, REBUILD_V1)
            (<Storage> items[0]).used += 1
            if (<Storage> items[0]).pushed == 1:
                self.events.data[(<Storage> items[0]).event] = KEEP
            self.settle(target, inner.entry)
            self.event(DONE_SKIP)
            return target
        if target.role in (PENDING_VARIABLE, PENDING_PARAMETER) and n == 5 and (
                type(items[0]) is Tensor) and (<Tensor> items[0]).role == FRESH and (
                (<Tensor> items[0]).entry >= 0) and not items[2] and type(items[3]) is bool:
            inner = <Tensor> items[0]
            inner.role = SHARED
            self.set_gradient(PARAMETER if target.role == PENDING_PARAMETER else VARIABLE,
                              inner.entry, items[3] is True)
            self.settle(target, inner.entry)
            self.event(DONE)
            return target
        if target.role == WRAPPER and n == 3 and type(items[0]) is bool and not items[2]:
            self.set_gradient(<int> target.event, target.entry, items[0] is True)
            self.event(DONE)
            return target
        raise self.fault(f"a state of {n} items for a tensor" if n >= 0 else
                         f"{brief(state)} as the state of a tensor")

    cdef int settle(self, Tensor target, Py_ssize_t entry) except -1:
        self.events.data[target.event] = LATE
        self.late[target.event] = entry
        target.entry = entry
        target.role = SHARED
        return 0

    cdef int on_extend(self, object target, list items) except -1:
        if type(target) is not Record:
            raise self.fault(f"appends to {brief(target)}")
        (<Record> target).items.extend(items)
        return 0

    cdef int on_update(self, object target, list pairs) except -1:
        if type(target) is not Record:
            raise self.fault(f"sets items of {brief(target)}")
        (<Record> target).pairs.extend(pairs)
        return 0
