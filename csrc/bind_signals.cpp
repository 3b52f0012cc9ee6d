// SPDX-License-Identifier: Apache-2.0
// HeldInterrupt: Ctrl-C waits while the state of several requests is changed together. Python runs its handler between
// any two of its instructions, and what that raises would tear requests that are not the caller's.
#include <pybind11/pybind11.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace py = pybind11;

namespace {

volatile sig_atomic_t arrived = 0;
void note(int) { arrived = 1; }

/// Whether this is the process's first thread, the one in which Python runs handlers. Asked once: a call of the system
/// is a noticeable part of what a step of a small model takes.
bool in_main_thread() {
    thread_local const bool main = syscall(SYS_gettid) == getpid();
    return main;
}

/// May be nested.
class HeldInterrupt {
 public:
    void enter() {
        if (!in_main_thread()) return;
        struct sigaction action{};
        action.sa_handler = note;
        sigemptyset(&action.sa_mask);
        sigaction(SIGINT, &action, &before_);
        holds_ = true;
        if (before_.sa_handler == SIG_DFL || before_.sa_handler == SIG_IGN)
            return restore();                   // nothing that could raise
        if (PyErr_CheckSignals() == 0) return;  // one that came before
        restore();
        throw py::error_already_set();
    }

    void exit(const py::object&, const py::object&, const py::object&) {
        if (holds_) restore();
    }

 private:
    void restore() {
        holds_ = false;
        sigaction(SIGINT, &before_, nullptr);
        if (before_.sa_handler == note || !arrived) return;
        arrived = 0;
        raise(SIGINT);
    }

    bool holds_ = false;
    struct sigaction before_{};
};

}  // namespace

void bind_signals(py::module_& module) {
    py::class_<HeldInterrupt>(module, "HeldInterrupt")
        .def(py::init<>())
        .def("__enter__", &HeldInterrupt::enter)
        .def("__exit__", &HeldInterrupt::exit, py::arg("kind"), py::arg("error"), py::arg("traceback"));
}
