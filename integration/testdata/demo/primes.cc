#include "primes.h"

std::vector<int> Primes(int limit) {
  std::vector<int> primes;
  for (int n = 2; n <= limit; ++n) {
    bool prime = true;
    for (int p : primes) prime = prime && n % p != 0;
    if (prime) primes.push_back(n);
  }
  return primes;
}
