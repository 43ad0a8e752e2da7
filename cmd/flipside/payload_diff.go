package main

import (
	"cmp"
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/payload/build"
)

// imageDiff is the JSON form of what is different between two images. Blocks have 4096 bytes.
type imageDiff struct {
	Schema     string       `json:"schema"`
	OldSize    int64        `json:"old_size"`
	NewSize    int64        `json:"new_size"`
	Blocks     int          `json:"blocks"`
	Same       int          `json:"same"`
	Moved      int          `json:"moved"`
	Zero       int          `json:"zero"`
	Changed    int          `json:"changed"`
	FilesKnown bool         `json:"files_known"`
	Files      []fileChange `json:"files,omitempty"`
	Other      int          `json:"changed_outside_files"`
}

type fileChange struct {
	Path    string `json:"path"`
	Change  string `json:"change"`
	From    string `json:"from,omitempty"`
	OldSize int64  `json:"old_size"`
	NewSize int64  `json:"new_size"`
	Blocks  int    `json:"changed_blocks"`
}

func (a *app) payloadDiffCommand() *cobra.Command {
	var top int
	cmd := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "say what is different between two images, by file where the file system is known",
		Long: `Diff compares two images block by block, wherever in the old image a block is, and says what an update from one to the other has to carry.
Where the file systems are ext4 or squashfs, it names the files, those that cost the most first.

Exit status: 0 there are differences or none; the output says which.`,
		Args: exactArgs(2, "OLD NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var images [2]build.Image
			for i, path := range args {
				f, size, err := openFile(path)
				if err != nil {
					return err
				}
				defer f.Close()
				if size == 0 || size%4096 != 0 {
					return withHint(fmt.Errorf("%s has %d bytes, want a multiple of 4096", path, size), "fill it up with: truncate -s %%4096 %s", path)
				}
				images[i] = build.Image{Name: path, Data: f, Size: size}
			}
			c, err := build.Compare(cmd.Context(), images[0], images[1])
			if err != nil {
				return err
			}
			if a.json {
				d := imageDiff{
					Schema: "flipside.image-diff/v1", OldSize: c.OldSize, NewSize: c.NewSize, Blocks: c.Blocks, Same: c.Same, Moved: c.Moved, Zero: c.Zero,
					Changed: c.Changed, FilesKnown: c.FilesKnown, Other: c.Other,
				}
				for _, f := range c.Files {
					d.Files = append(d.Files, fileChange{f.Path, f.Kind, f.From, f.Old, f.New, f.Blocks})
				}
				return a.printJSON(d)
			}
			return a.printDiff(c, top)
		},
	}
	cmd.Flags().IntVar(&top, "top", 50, "how many files to name; 0 is all")
	return cmd
}

func (a *app) printDiff(c build.Comparison, top int) error {
	share := func(n int) string {
		return fmt.Sprintf("%d\t%s\t%.1f %%", n, formatBytes(int64(n)*4096), float64(n)*100/float64(c.Blocks))
	}
	tw := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(tw, "blocks\t%s\t\n", share(c.Blocks))
	fmt.Fprintf(tw, "at the same place\t%s\t\n", share(c.Same))
	fmt.Fprintf(tw, "elsewhere in the old image\t%s\t\n", share(c.Moved))
	fmt.Fprintf(tw, "zeros\t%s\t\n", share(c.Zero))
	fmt.Fprintf(tw, "changed\t%s\t\n", share(c.Changed))
	if c.FilesKnown {
		fmt.Fprintf(tw, "changed, in no file\t%s\t\n", share(c.Other))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if !c.FilesKnown {
		_, err := fmt.Fprintln(a.stdout, "\nfiles: unknown, the images are neither ext4 nor squashfs that can be read")
		return err
	}
	files := slices.Clone(c.Files)
	slices.SortStableFunc(files, func(x, y build.Change) int { return cmp.Compare(y.Blocks, x.Blocks) })
	left := 0
	if top > 0 && len(files) > top {
		left, files = len(files)-top, files[:top]
	}
	fmt.Fprintln(a.stdout)
	tw = tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	for _, f := range files {
		what := f.Path
		if f.From != "" {
			what = f.From + " → " + f.Path
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", f.Kind, formatBytes(int64(f.Blocks)*4096), what)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if left > 0 {
		fmt.Fprintf(a.stdout, "and %d more; --top 0 names all\n", left)
	}
	return nil
}
