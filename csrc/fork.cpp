// SPDX-License-Identifier: Apache-2.0
#include "fork.hpp"

#include <pthread.h>

#include <mutex>

namespace cnl {

/// All living objects. The list is locked while a process forks, so that the child finds it whole.
struct ForkList {
    std::mutex mutex;
    ForkAware* first = nullptr;

    static ForkList& instance() {
        static ForkList* const list = [] {
            pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); }, in_child);
            return new ForkList;  // never deleted: objects may outlive static ones
        }();
        return *list;
    }

    static void in_child() {
        ForkList& list = instance();
        for (ForkAware* object = list.first; object; object = object->next_) object->after_fork();
        list.mutex.unlock();
    }

    void add(ForkAware& object) {
        const std::scoped_lock lock(mutex);
        object.next_ = first;
        if (first) first->previous_ = &object;
        first = &object;
    }

    void remove(ForkAware& object) {
        const std::scoped_lock lock(mutex);
        (object.previous_ ? object.previous_->next_ : first) = object.next_;
        if (object.next_) object.next_->previous_ = object.previous_;
    }
};

ForkAware::ForkAware() { ForkList::instance().add(*this); }
ForkAware::~ForkAware() { ForkList::instance().remove(*this); }

}  // namespace cnl
