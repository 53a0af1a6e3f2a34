#ifndef PRIMES_H_
#define PRIMES_H_

#include <vector>

// Primes returns the prime numbers up to and including limit, smallest first.
std::vector<int> Primes(int limit);

#endif  // PRIMES_H_
