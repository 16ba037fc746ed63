// What compiled programs need and PyTorch has not got: an all-reduce between threads, and memory that is handed out fast.
// Built once a machine by core/native.py, which says what each is worth. Knows nothing of what the programs compute.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

// --- all-reduce -----------------------------------------------------------------------------------------------------------
//
// worker: int64 (4,): rank, number of workers, address of the meeting place, calls so far.
// meeting place: a line of 8 int64 for each worker: calls it has come to, address of its x, calls it has left; and one more line
// whose first number is not 0 once a worker has failed. Nobody leaves before all have read. Who waits spins some 20 us, then
// yields.

namespace {

constexpr int64_t kLine = 8;
constexpr int kSpins = 10000;

bool arrive_and_wait(int64_t* place, int64_t rank, int64_t workers, int64_t field, int64_t call) {
  __atomic_store_n(place + kLine * rank + field, call, __ATOMIC_RELEASE);
  for (int64_t other = 0; other < workers; ++other) {
    for (int64_t spins = 0; __atomic_load_n(place + kLine * other + field, __ATOMIC_ACQUIRE) < call; ++spins) {
      if (__atomic_load_n(place + kLine * workers, __ATOMIC_RELAXED)) return false;
      if (spins > kSpins) std::this_thread::yield();
    }
  }
  return true;
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_all_reduce(AtenTensorHandle x, AtenTensorHandle worker, AtenTensorHandle* result) {
  void *mine, *self_data, *sum_data;
  int64_t size;
  if (aoti_torch_clone(x, result) || aoti_torch_get_numel(x, &size) || aoti_torch_get_data_ptr(x, &mine) ||
      aoti_torch_get_data_ptr(worker, &self_data) || aoti_torch_get_data_ptr(*result, &sum_data)) {
    return AOTI_TORCH_FAILURE;
  }
  auto* self = static_cast<int64_t*>(self_data);
  auto* sum = static_cast<float*>(sum_data);
  const int64_t rank = self[0], workers = self[1], call = ++self[3];
  auto* place = reinterpret_cast<int64_t*>(self[2]);
  __atomic_store_n(place + kLine * rank + 1, reinterpret_cast<int64_t>(mine), __ATOMIC_RELAXED);
  if (!arrive_and_wait(place, rank, workers, 0, call)) return AOTI_TORCH_FAILURE;
  for (int64_t other = 0; other < workers; ++other) {  // in the order of ranks: all get the same bits
    const auto* theirs = reinterpret_cast<const float*>(__atomic_load_n(place + kLine * other + 1, __ATOMIC_RELAXED));
    if (other == 0) {
      std::memcpy(sum, theirs, size * sizeof(float));
    } else {
      for (int64_t i = 0; i < size; ++i) sum[i] += theirs[i];
    }
  }
  return arrive_and_wait(place, rank, workers, 2, call) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// --- memory ---------------------------------------------------------------------------------------------------------------
//
// A compiled program allocates each intermediate tensor anew, hundreds a millisecond. Blocks of 2^6 to 2^20 bytes that are freed
// are kept for the next request of that size, in a list of the thread's own: no lock, no search. Anything larger, and what a list
// has no room for, goes back to the system.

namespace {

constexpr std::size_t kHeader = 64;  // before each block, which stays aligned to 64 bytes: its list, or kLists
constexpr int kSmallest = 6, kLists = 15;

struct Block {
  Block* next;
};

struct Lists {
  Block* first[kLists] = {};
  int length[kLists] = {};
  ~Lists();
};

thread_local bool lists_are_gone = false;  // trivial, so it outlives `lists` when a thread ends
thread_local Lists lists;

Lists::~Lists() {
  lists_are_gone = true;
  for (auto* block : first) {
    while (block != nullptr) {
      auto* next = block->next;
      std::free(reinterpret_cast<char*>(block) - kHeader);
      block = next;
    }
  }
}

int list_of(std::size_t bytes) {
  if (bytes <= (std::size_t{1} << kSmallest)) return 0;
  return 64 - __builtin_clzll(bytes - 1) - kSmallest;
}

int room(int list) {  // 4 MiB, and at least 8 blocks
  const int blocks = (4 << 20) >> (list + kSmallest);
  return blocks < 8 ? 8 : blocks > 256 ? 256 : blocks;
}

void give_back(void* data) {
  if (data == nullptr) return;
  auto* start = static_cast<char*>(data) - kHeader;
  const int list = *reinterpret_cast<int*>(start);
  if (list >= kLists || lists_are_gone || lists.length[list] >= room(list)) {
    std::free(start);
    return;
  }
  auto* block = static_cast<Block*>(data);
  block->next = lists.first[list];
  lists.first[list] = block;
  ++lists.length[list];
}

struct PoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &give_back, device};
    const int list = list_of(bytes);
    if (list < kLists && !lists_are_gone && lists.first[list] != nullptr) {
      auto* block = lists.first[list];
      lists.first[list] = block->next;
      --lists.length[list];
      return {block, block, &give_back, device};
    }
    void* start = nullptr;
    const std::size_t size = list < kLists ? std::size_t{1} << (list + kSmallest) : bytes;
    if (posix_memalign(&start, kHeader, kHeader + size) != 0) throw std::bad_alloc();
    *static_cast<int*>(start) = list < kLists ? list : kLists;
    void* data = static_cast<char*>(start) + kHeader;
    return {data, data, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" void fastppo_pool_memory() {
  static PoolAllocator pool;
  c10::SetCPUAllocator(&pool, 1);
}
