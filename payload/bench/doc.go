// Package bench measures how fast payloads are applied, against what a C engine does in one thread with the system's libraries
// (testdata/reference.c), in the same run and on the same data. "make bench-payload" runs it; there is nothing to import.
package bench
