from ._pickle_stack cimport Stack


cdef class Machine(Stack):
    # What a str of Python 2 is decoded by, or "bytes" to leave it; None: by what it seems to be.
    cdef str encoding

    cdef int grow_marks(self) except -1
    cdef str decode(self, const char *text, Py_ssize_t nbytes)
    cdef object decode_old(self, const char *text, Py_ssize_t nbytes)
    cdef int make_dict(self) except -1
    cdef object decimal(self, str text, int op)
    cdef int global_(self, object module, object name) except -1
    cdef object run(self)
    cdef object run_all(self)
    cdef int step(self, int op) except -1
    cdef int step_text(self, int op) except -1
    cdef int step_rare(self, int op) except -1
    cdef int step_make(self, int op) except -1
    cdef object on_global(self, str module, str name)
    cdef object on_persistent(self, object pid)
    cdef object on_call(self, object func, tuple args)
    cdef object on_new(self, object cls, tuple args, dict kwargs)
    cdef object on_build(self, object target, object state)
