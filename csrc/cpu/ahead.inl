// What will be read, asked for while something else is computed.
namespace FSSA_ISA {

// How a line is asked for: into the first-level cache, to stay in a cache or only to pass, or into the
// second-level cache.
enum class Request { kFirst, kPassing, kSecond };

// Whether the first-level cache has 32 KB, as Zen 4 has, not 48, as Zen 5 has: on either, requests were
// tried out.
FSSA_INLINE bool has_small_first_cache() { return first_cache_bytes() < 48 * 1024; }

// What will be read next: one piece of memory, then those in a queue. A step of the inner loop asks for
// as much as it reads, or, where several tiles read the same, for half of that: a core that asks for
// more than the memory brings waits for it, and makes up for nothing while it asks for none. `request` is
// how the piece at hand is asked for: in products not as the queue is, where it is weights that are read
// once a step, so that what is smaller than the last cache and read in every step too (A, B, keys and
// values) may stay there. `early` bytes were asked for while nothing was read that counts: the steps
// that follow leave as many out.
struct Ahead {
  const char* at;
  const char* end;
  Span* queue;
  Span* queue_end;
  bool halved;
  Request request = Request::kFirst;
  int64_t early = 0;
  Request queued = Request::kFirst;  // how the queue is asked for
};

// Requests for what a queue from `spans` to `end` has, beside something short: A of a low-rank term, keys
// and values. With a small first-level cache those into the second one were faster for the latter (Zen 4).
FSSA_INLINE Ahead requests_for(Span* spans, Span* end) {
  Ahead ahead{nullptr, nullptr, spans, end, false};
  if (has_small_first_cache()) ahead.queued = Request::kSecond;
  return ahead;
}

constexpr int64_t kStepBytes = kPanelColumns * 4;
constexpr int64_t kLongestStep = kUnitBytes;  // of compressed weights

template <int kBytes>
FSSA_INLINE void fetch(Ahead& ahead) {
  if (ahead.at >= ahead.end) {
    if (ahead.queue == ahead.queue_end) return;
    ahead.at = ahead.queue->data;
    ahead.end = ahead.at + ahead.queue->bytes;
    ahead.request = ahead.queued;
    ++ahead.queue;
  }
  if (ahead.request == Request::kPassing) {
    FSSA_UNROLL
    for (int i = 0; i < kBytes; i += 64) prefetch_passing(ahead.at + i);
  } else if (ahead.request == Request::kSecond) {
    FSSA_UNROLL
    for (int i = 0; i < kBytes; i += 64) prefetch_second(ahead.at + i);
  } else {
    FSSA_UNROLL
    for (int i = 0; i < kBytes; i += 64) prefetch(ahead.at + i);
  }
  ahead.at += kBytes;
}

// The same, unless as much was asked for early.
template <int kBytes>
FSSA_INLINE void fetch_due(Ahead& ahead) {
  if (ahead.early >= kBytes) {
    ahead.early -= kBytes;
  } else {
    fetch<kBytes>(ahead);
  }
}

// The same for a step of any tile: half of it where half is enough.
template <int kBytes>
FSSA_INLINE void fetch_some(Ahead& ahead) {
  if (ahead.halved) {
    fetch<kBytes / 2>(ahead);
  } else {
    fetch_due<kBytes>(ahead);
  }
}

// What may be asked for beside a few steps that read something else, so that the memory does not stand
// still meanwhile: nothing but of what is read once, and nothing before the last ones were made up for.
FSSA_INLINE Ahead early_requests(const Ahead& brought) {
  const bool more = brought.request != Request::kFirst && brought.early < kLongestStep;
  Ahead ahead = more ? brought : Ahead{};
  ahead.early = 0;
  return ahead;
}

// After those steps. Without this the requests would run further ahead with every panel, until the
// first-level cache did not hold them any more.
FSSA_INLINE void count_early(Ahead& brought, const Ahead& ahead) {
  if (ahead.end == nullptr) return;
  const int64_t before = brought.early, asked = ahead.at - brought.at;
  brought = ahead;
  brought.early = before + (ahead.request != Request::kFirst ? asked : 0);
}

// Asks for all that is left.
FSSA_INLINE void fetch_rest(Ahead& ahead) {
  while (ahead.at < ahead.end || ahead.queue != ahead.queue_end) fetch<64>(ahead);
}

// The queue, which began at `queue`, after a loop: what is left of the piece at hand goes back.
FSSA_INLINE Span* unread(const Ahead& ahead, Span* queue) {
  if (ahead.queue == queue || ahead.at >= ahead.end) return ahead.queue;
  *(ahead.queue - 1) = {ahead.at, ahead.end - ahead.at};
  return ahead.queue - 1;
}

}  // namespace FSSA_ISA
