#include <cstdlib>
#include <iostream>

#include "primes.h"
#include "table.h"

int main(int argc, char** argv) {
  const int limit = argc > 1 ? std::atoi(argv[1]) : 100;
  std::cout << Table(Primes(limit));
}
