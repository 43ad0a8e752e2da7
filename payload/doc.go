// Package payload reads, verifies and applies CrAU payloads, major versions 1 and 2.
package payload
