// What a product asks for ahead, while a thread computes its panels one after the other.
namespace FSSA_ISA {

// With a panel comes the next one and, since the low-rank term has steps too, something of the one
// after it, then what the queue has; with the last one what the next call reads first.
class PanelReads {
 public:
  FSSA_INLINE_MEMBER PanelReads(const ModulatedLinearCall& call, Team& team)
      : call_(call), team_(team), queue_(team.meanwhile()) {}

  // Before a run of panels from `first` to `last`, the thread's last ones or not. Of the panel
  // that the thread begins with comes before all else what the calls before have left, unless that
  // is most of it: then it would be asked for when it is read, and so would all that follows.
  FSSA_INLINE_MEMBER void begin(int64_t first, int64_t last, bool ends) {
    FirstReads& due = team_.due();
    const char* const left = due.begin() != due.end() ? due.end()[-1].data : nullptr;
    const char* const next = call_.panel(first + 1);
    asked_ = next - call_.panel_bytes() / 2 <= left && left < next ? left : next;
    last_ = last;
    ends_ = ends;
  }

  // For the tiles of a panel, several or one.
  FSSA_INLINE_MEMBER Ahead of(int64_t panel, bool several) {
    const char* const stop = call_.panel(last_ + 1);
    const bool halved = several && asked_ >= call_.panel(panel + 1);
    if (panel == last_ && ends_) {
      FirstReads& upcoming = team_.upcoming();
      return {asked_, stop, upcoming.begin(), upcoming.end(), halved};
    }
    const char* const from = panel == last_ ? call_.panel(0) : asked_;
    const char* const bound = call_.panel(panel + 2) + kLeadBytes;
    asked_ = panel == last_ ? call_.panel(1) : bound < stop ? bound : stop;
    return {from, asked_, queue_, team_.meanwhile_end(), halved};
  }

  // After them: what was not asked for is left.
  FSSA_INLINE_MEMBER void leave(int64_t panel, const Ahead& ahead) {
    if (panel == last_ && ends_) {
      FirstReads& upcoming = team_.upcoming();
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
  const ModulatedLinearCall& call_;
  Team& team_;
  Span* queue_;
  const char* asked_ = nullptr;
  int64_t last_ = 0;
  bool ends_ = false;
};

}  // namespace FSSA_ISA
