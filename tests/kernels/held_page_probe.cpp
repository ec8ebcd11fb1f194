// Two pages of memory whose readers must wait, for ten seconds at most: those of the first until
// somebody reads the second, those of the second until all is done that does not need it.
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cmath>
#include <cstdint>

namespace {

constexpr int kSeconds = 10;

// [rows, columns], a row every `stride` numbers, NaN where nothing is written yet; columns [first, last)
// need the second page.
struct Results {
  const volatile float* data;
  int64_t rows, columns, stride, first, last;
};

char* pages[2];
int64_t page_bytes;
Results results;
std::atomic<int> readers[2], late;
struct sigaction before;

bool all_else_is_done() {
  for (int64_t r = 0; r < results.rows; ++r) {
    for (int64_t c = 0; c < results.columns; ++c) {
      const bool needs_page = results.first <= c && c < results.last;
      if (!needs_page && std::isnan(results.data[r * results.stride + c])) return false;
    }
  }
  return true;
}

void wait(int signal, siginfo_t* info, void*) {
  const char* at = static_cast<char*>(info->si_addr);
  int which = 0;
  while (which < 2 && !(pages[which] <= at && at < pages[which] + page_bytes)) ++which;
  if (which == 2) {
    sigaction(signal, &before, nullptr);  // a fault of somebody else
    return;
  }
  ++readers[which];
  timespec start, now;
  clock_gettime(CLOCK_MONOTONIC, &start);
  while (which == 0 ? readers[1] == 0 : !all_else_is_done()) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec - start.tv_sec > kSeconds) {
      ++late;
      break;
    }
  }
  mprotect(pages[which], page_bytes, PROT_READ | PROT_WRITE);
}

}  // namespace

extern "C" int hold(char* first_page, char* second_page, int64_t bytes, const float* data,
                    int64_t rows, int64_t columns, int64_t stride, int64_t first,
                    int64_t last) {
  pages[0] = first_page;
  pages[1] = second_page;
  page_bytes = bytes;
  results = {data, rows, columns, stride, first, last};
  readers[0] = readers[1] = late = 0;
  struct sigaction action = {};
  action.sa_sigaction = wait;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &before);
  return mprotect(pages[0], bytes, PROT_NONE) | mprotect(pages[1], bytes, PROT_NONE);
}

// How many gave up waiting; -1 where nobody read the second page.
extern "C" int release() {
  for (char* page : pages) mprotect(page, page_bytes, PROT_READ | PROT_WRITE);
  sigaction(SIGSEGV, &before, nullptr);
  return readers[1] == 0 ? -1 : late.load();
}
