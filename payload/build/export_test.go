package build

// Within is a payload that tries to do with so many operations and extents.
func Within(s Spec, messages int) Spec {
	s.messages = messages
	return s
}
