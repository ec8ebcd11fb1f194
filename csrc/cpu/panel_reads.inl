// What a product asks for ahead, while a thread computes its panels one after the other.
namespace FSSA_ISA {

// How a thread asks for panels that it reads once, and how far ahead of what it reads.
struct Lead {
  Request request;
  int64_t bytes;
};

// Far enough ahead for what the memory brings while a line is under way, and near enough to stay in the
// first-level cache: ten kilobytes were chosen on one of 48 (Zen 5), four on one of 32 (Zen 4), where
// ten were slower. There a core that multiplies for most of the time was faster with requests into
// the second-level cache, and with six kilobytes rather than four or ten.
FSSA_INLINE Lead lead_of(int64_t num_tokens) {
  if (!has_small_first_cache()) return {Request::kPassing, 10 * 1024};
  if (num_tokens < kBusyRows) return {Request::kPassing, 4 * 1024};
  return {Request::kSecond, 6 * 1024};
}

// How far beyond the next panel tiles that share one may ask.
constexpr int64_t kBeyondNextBytes = 64 * 1024;

// Where all rows are one tile that takes both halves of a panel at once, a thread's panels are one
// stretch of memory that is read once, and a lead ahead of it run the requests, in the end for what
// the next call reads first. Where a panel is read again and again, by several tiles or half by half,
// all of that together asks for the next one and, where tiles are more than two, for something of the
// one after it, then for what the queue has.
class PanelReads {
 public:
  FSSA_INLINE_MEMBER PanelReads(const ModulatedLinearCall& call, Team& team, int64_t num_tokens)
      : call_(call),
        team_(team),
        once_(2 * num_tokens <= kMaxSums),
        several_(num_tokens > kMaxRows),
        lead_(once_ ? lead_of(num_tokens) : Lead{Request::kFirst, 0}),
        queue_(team.meanwhile()) {}

  // Before a run of panels from `first` to `last`, the thread's last ones or not.
  FSSA_INLINE_MEMBER void begin(int64_t first, int64_t last, bool ends) {
    last_ = last;
    ends_ = ends;
    FirstReads& due = team_.due();
    const char* const start = call_.panel(first);
    const char* const next = call_.panel(first + 1);
    const char* const left = due.begin() != due.end() ? due.end()[-1].data
                             : due.known()            ? next
                                                      : start;
    if (once_) {
      const char* const due_now = earlier(start + lead_.bytes, call_.panel(last + 1));
      const char* const from = start <= left && left <= next ? left : start;
      Ahead ahead{from, due_now, nullptr, nullptr, false, lead_.request};
      fetch_rest(ahead);
      asked_ = ahead.at;
      early_ = asked_ - due_now;
    } else {
      // Of the panel that the thread begins with comes before all else what the calls before have
      // left, unless that is most of it: then it would be asked for when it is read, and so would
      // all that follows.
      asked_ = next - call_.panel_bytes() / 2 <= left && left < next ? left : next;
    }
  }

  // For the tiles of a panel.
  FSSA_INLINE_MEMBER Ahead of(int64_t panel) {
    const char* const stop = call_.panel(last_ + 1);
    const bool halved = several_ && asked_ >= call_.panel(panel + 1);
    if (reaches_next_call(panel)) {
      FirstReads& upcoming = team_.upcoming();
      return {asked_, stop, upcoming.begin(), upcoming.end(), halved, lead_.request, early_};
    }
    const char* const from = panel == last_ ? call_.panel(0) : asked_;
    asked_ = panel == last_ ? call_.panel(1)
                            : earlier(call_.panel(panel + 2) + kBeyondNextBytes, stop);
    return {from, asked_, queue_, team_.meanwhile_end(), halved};
  }

  // After them: what was not asked for is left.
  FSSA_INLINE_MEMBER void leave(int64_t panel, const Ahead& ahead) {
    if (reaches_next_call(panel)) {
      FirstReads& upcoming = team_.upcoming();
      asked_ = ahead.queue == upcoming.begin() ? ahead.at : call_.panel(last_ + 1);
      early_ = ahead.early;
      upcoming.left_from(unread(ahead, upcoming.begin()));
    } else {
      if (ahead.queue == queue_ && ahead.at < asked_) asked_ = ahead.at;
      queue_ = unread(ahead, queue_);
    }
  }

  // For tiles of others, whose panels nobody asks for: the queue alone.
  FSSA_INLINE_MEMBER Ahead of_queue() const {
    return {nullptr, nullptr, queue_, team_.meanwhile_end(), true};
  }

  // After all of them: the rest of the queue is the next product's.
  FSSA_INLINE_MEMBER void end(const Ahead& ahead) {
    queue_ = unread(ahead, queue_);
    team_.set_meanwhile(queue_, team_.meanwhile_end());
  }

 private:
  static FSSA_INLINE_MEMBER const char* earlier(const char* a, const char* b) {
    return a < b ? a : b;
  }

  // Whether the requests of a panel's tiles may go beyond this call.
  FSSA_INLINE_MEMBER bool reaches_next_call(int64_t panel) const {
    return once_ || (panel == last_ && ends_);
  }

  const ModulatedLinearCall& call_;
  Team& team_;
  const bool once_, several_;
  const Lead lead_;
  Span* queue_;
  const char* asked_ = nullptr;
  int64_t last_ = 0, early_ = 0;
  bool ends_ = false;
};

}  // namespace FSSA_ISA
