#include "kept.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

namespace fif {

struct Kept::Entry {
  KeptKey key;
  int64_t bytes;
  void* data;
  std::atomic<int> users{1};

  static void release(Entry* entry) {
    if (entry->users.fetch_sub(1) > 1) return;
    std::free(entry->data);
    delete entry;
  }
};

struct Kept::Store {
  static constexpr int64_t kMostBytes = int64_t(256) << 20;
  std::mutex mutex;
  std::unordered_map<uint64_t, Entry*> entries;
  int64_t bytes = 0;

  // Never destroyed: a thread may still compute while the process ends.
  static Store& get() {
    static Store* const store = new Store;
    return *store;
  }
  void clear() {
    for (auto& [hash, entry] : entries) Entry::release(entry);
    entries.clear();
    bytes = 0;
  }
};

Kept::Kept(const KeptKey& key, int64_t bytes) {
  Store& store = Store::get();
  {
    const std::lock_guard<std::mutex> lock(store.mutex);
    const auto found = store.entries.find(key.content[0]);
    if (found != store.entries.end() && std::memcmp(&found->second->key, &key, sizeof key) == 0) {
      entry_ = found->second;
      ++entry_->users;
      data = entry_->data;
      fresh = false;
      return;
    }
  }
  fresh = true;
  entry_ = new Entry{key, bytes, nullptr};
  if (posix_memalign(&entry_->data, 64, static_cast<size_t>(bytes)) != 0) {
    delete entry_;
    throw std::bad_alloc();
  }
  data = entry_->data;
}

Kept::~Kept() { Entry::release(entry_); }

void Kept::publish() {
  Store& store = Store::get();
  if (entry_->bytes > Store::kMostBytes) return;
  const std::lock_guard<std::mutex> lock(store.mutex);
  if (store.bytes + entry_->bytes > Store::kMostBytes) store.clear();
  auto& place = store.entries[entry_->key.content[0]];
  if (place) {
    store.bytes -= place->bytes;
    Entry::release(place);
  }
  place = entry_;
  ++entry_->users;
  store.bytes += entry_->bytes;
}

}  // namespace fif
